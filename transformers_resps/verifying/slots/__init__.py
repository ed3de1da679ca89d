"""Verify trees, compiled or eagerly, with keys and values in static buffers: token i of a text has slot i."""
