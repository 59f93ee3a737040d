"""The commands of login nodes: click, one file a command, never torch."""
