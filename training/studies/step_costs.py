"""Part of the studies `headroom`, `ablations` and `noisy_clocks`: reads the cost tables that replace their clock."""

import json
from pathlib import Path
from typing import Any

from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.replay import OutcomeTable, RankedText, RecordedText


def read_tables(files: list[Path]) -> dict[str, CostTable]:
    """Read cost tables by name: those of a benchmark's `results.json`, or all that another file holds."""
    tables: dict[str, CostTable] = {}
    for file in files:
        read = json.loads(file.read_text(encoding="utf-8"))
        found = {file.parent.name: read["costs"]} if "costs" in read else read
        tables |= {name: _table(values) for name, values in found.items()}
    return tables


def _table(values: dict[str, Any]) -> CostTable:
    verify = {int(c): {int(n): float(s) for n, s in row.items()} for c, row in values["verify"].items()}
    draft, start = (
        {int(width): float(seconds) for width, seconds in values.get(part, {}).items()}
        for part in ("draft", "draft_start")
    )
    return CostTable(verify, draft, {}, float(values["overhead"] or 0.0), draft_start=start)


def outcome_table(texts: list[RecordedText], grid: ActionGrid, table: CostTable) -> OutcomeTable:
    """Compute the outcome of every action at every position of every text."""
    return OutcomeTable([RankedText.from_recording(text).outcomes(grid, table) for text in texts])
