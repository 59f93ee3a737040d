"""Messages, ids, states, times, errors and configuration types. No I/O."""
