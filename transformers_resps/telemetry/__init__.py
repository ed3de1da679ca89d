"""Reports of calls of `generate`: a record of each step, and a summary of all of them."""

from .report import Proposed, RowCounts, SpeculationReport, StepRecord


__all__ = ["Proposed", "RowCounts", "SpeculationReport", "StepRecord"]
