"""Every transition of the broker: step(state, event, now) -> commands. Pure."""
