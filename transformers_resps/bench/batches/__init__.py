"""How fast batches are: plain, rows that advance apart, rows in lockstep, and every row alone, in turn."""
