"""Results files of made-up experiments, and the page of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.evidence.experiments import EXPERIMENTS, Experiment
from training.evidence.page import write_page
from training.evidence.sealed import seal


CODE = "c0de" * 16
DISTURBED = {"neighbours": 0.3}
DRIFTED = {"before": [1.0] * 4, "after": [1.3] * 4}
ZEN = "AMD EPYC, AVX512"


def machine(device: str = ZEN, release: str = "0.1.0") -> dict[str, Any]:
    return {"device": device, "versions": {"transformers-resps": release}}


def experiment(name: str) -> Experiment:
    return next(one for one in EXPERIMENTS if one.name == name)


def rows_of(
    arms: Sequence[str],
    seconds: dict[str, float],
    prompts: int = 4,
    number: int = 0,
    steps: dict[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Ten tokens of every arm and prompt; an arm takes `seconds`, or one."""
    return [
        {"arm": arm, "prompt": f"a/{prompt}", "turn": 1, "tokens": 10, "forwards": 5, "first": 0.1, "same": True,
         "mib": 670.0, "seconds": seconds.get(arm, 1.0) * (1 + 0.01 * prompt + 0.001 * number),
         "draft": 0.2, "verify": 0.3, "steps": steps or {"4/1": 5}}
        for prompt in range(prompts) for arm in arms
    ]  # fmt: skip


def write(folder: Path, name: str, number: int = 0, seconds: dict[str, float] | None = None, **changes: Any) -> Path:
    """A whole file of an experiment of the protocol, with some fields changed."""
    one, file = experiment(name), folder / f"{name}-{number}.json"
    results = {
        "experiment": name,
        "process": number,
        "code": {"code_sha256": CODE, "commit": "1234", "dirty": False},
        "weights": {"target": ["aa", "bb"]},
        "machine": machine(),
        "settings": {"prompts": {"a/0": "ff"}},
        "arms": list(one.arms),
        "left_out": {},
        "quiet": {},
        "rows": rows_of(one.arms, seconds or {}, number=number),
    }
    seal(file, results | changes)
    return file


def write_all(folder: Path, name: str, seconds: dict[str, float] | None = None, **changes: Any) -> None:
    """Files of all its processes."""
    for number in range(experiment(name).processes):
        write(folder, name, number, seconds, **changes)


def page_of(folder: Path, *, quick: bool = False) -> str:
    write_page(folder / "benchmarks.md", folder / "measured", quick=quick)
    return (folder / "benchmarks.md").read_text()
