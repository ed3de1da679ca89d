"""Who proposes tokens: the interface of all drafters, a head's pool, and lookup in the text so far."""
