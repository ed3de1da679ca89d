"""Policies, which choose the shape of each step's draft tree."""
