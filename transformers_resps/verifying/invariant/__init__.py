"""The exact mode (`invariant=True`): its attention, experts, steps and errors, and how many rows its kernels need."""
