"""Measures batches in turn: plain, ragged, in lockstep, and every row alone."""
