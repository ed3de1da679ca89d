"""What compiling, capturing and compiled code may raise, and how it is told."""

# Out of memory, no compiler, code that cannot be traced, ...
FAULTS = (RuntimeError, ImportError, OSError, TypeError, AttributeError, AssertionError, NotImplementedError)


def described(fault: Exception) -> str:
    """What went wrong, in one line: PyTorch adds advice for its developers, and names the backend first."""
    lines = [line for line in str(fault).splitlines() if line.strip() and not line.endswith("raised:")]
    return " ".join([f"{type(fault).__name__}:", *lines[:1]]).rstrip(".")
