"""The Prompt Bank on a shared filesystem: entries and their store. No torch."""
