"""What the broker knows: requests, allocations, and the events that change them. Pure."""
