"""Run functions of tensors fast: compile them once for all sizes on a CPU, or capture a graph per size on a GPU."""
