"""`generate` of an attached model: its keywords and refusals, the plan of a call, and the decoding."""
