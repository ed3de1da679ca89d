"""`generate` of an attached model: its keywords, the checks that refuse calls, the plan of a call, and decoding."""
