"""Who proposes tokens: a head's pool, grown level by level, and lookup in the text so far."""
