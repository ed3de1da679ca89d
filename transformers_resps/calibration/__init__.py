"""What steps cost on this machine: `calibrate` measures a `CostTable`."""

from .cost_table import CostTable
from .measuring import calibrate


__all__ = ["CostTable", "calibrate"]
