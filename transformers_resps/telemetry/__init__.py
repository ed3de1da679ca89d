"""What happened in a call of `generate`: the record of each step, and the report over all of them."""

from .report import Proposed, RowCounts, SpeculationReport, StepRecord


__all__ = ["Proposed", "RowCounts", "SpeculationReport", "StepRecord"]
