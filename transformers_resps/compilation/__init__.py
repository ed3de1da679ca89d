"""Run a function of tensors with few launches: compiled for all sizes on a CPU, a captured graph per size on a GPU."""
