"""The exact mode: its attention, experts, steps, prompts and refusals, and how many rows its kernels need."""
