"""Sockets, framing, authentication and limits."""
