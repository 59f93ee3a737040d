"""What to do about it: estimates, placement and scaling. Pure functions over the state."""
