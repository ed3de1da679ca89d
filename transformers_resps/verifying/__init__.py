"""The target: its forward over a tree, its features, tree attention, and the caches that hold a tree."""
