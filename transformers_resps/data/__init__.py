"""What heads and policies learn from: conversations, examples, draft vocabularies."""
