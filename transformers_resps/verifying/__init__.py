"""Run the target: forwards over draft trees, their attention and caches, and the features that draft heads read."""
