"""The step loop: draft, verify, accept, keep."""
