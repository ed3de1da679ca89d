"""The step loop of `generate`: draft a tree, verify it, accept tokens, keep their cache entries."""
