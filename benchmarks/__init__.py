"""Measurements: each script prints one JSON document with --json, a table without it."""
