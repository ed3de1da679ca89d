"""Verify trees with keys and values in static buffers, in which token i of a text has slot i; compiled or eagerly."""
