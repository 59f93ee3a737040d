"""The journal: events and projections in SQLite, committed before anything is acknowledged."""
