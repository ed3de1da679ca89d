"""The exact mode whole: its attention and experts, the needs of its kernels, its steps, prompts and refusals."""
