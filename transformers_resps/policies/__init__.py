"""Policies: they decide how each step drafts."""
