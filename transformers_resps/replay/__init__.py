"""Recorded texts, and what any policy would have done on them; no model runs."""
