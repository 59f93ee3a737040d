"""The imperative shell: gathers what happened, steps the core, commits, then acts. One thread, one loop."""
