"""Pytest imports none of this: PyTorch would take the pretend device for this machine's accelerator ever after."""

collect_ignore_glob = ["*.py"]
