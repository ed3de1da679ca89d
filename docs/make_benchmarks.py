"""Fill the tables of two pages of results from the files named there: `python docs/make_benchmarks.py`.

It writes what stands between `<!-- table KIND [OPTION ...] FILE ... -->` and `<!-- end -->`; the rest is prose.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "training" / "studies" / "BENCHMARKS.md")
MARK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
DATASETS = {"mt_bench": "MT-Bench", "humaneval": "HumanEval", "gsm8k": "GSM8K", "alpaca": "Alpaca", "cnn_dm": "CNN/DM"}
COLUMNS = ("prompt lookup", "EAGLE-3 60/5/10", "fixed tree", "`auto`")
STARTS = ("prompt lookup", "EAGLE-3 60/5/10", ("best fixed", "tree"), "auto")  # of their methods
WORDS = {"auto": "`auto`", "ours": "`auto`", "oracle (ceiling)": "*oracle*", "rows apart": "ragged", "given": "ours"}
INTERVAL = "{low:.2f} to {high:.2f}"
COMPILED = ", compiled"  # after the name of a method


@dataclass(frozen=True)
class Results:
    """A results file, by its path in the repository, and the way there from the page."""

    path: str
    data: dict[str, Any]
    way: str = "../"

    @classmethod
    def load(cls, path: str, page: Path = PAGES[0]) -> "Results":
        """Read a file; one that is noisy or not finished is a `ValueError`."""
        data = json.loads((ROOT / path).read_text(encoding="utf-8"))
        if data.get("noise", {}).get("accepted") or data.get("partial"):
            raise ValueError(f"{path} is noisy or partial. Measure it again, or remove it from {page.name}.")
        return cls(path, data, "../" * len(page.relative_to(ROOT).parts[:-1]))

    @property
    def link(self) -> str:
        file = Path(self.path)
        return f"[{file.parent.name if file.stem == 'results' else file.stem}]({self.way}{self.path})"

    @property
    def asked(self) -> dict[str, Any]:
        return dict(self.data.get("settings") or self.data.get("arguments", {}))

    @property
    def target(self) -> str:
        return Path(self.data["head"]).name.removesuffix("-head")

    @property
    def conditions(self) -> str:
        data, versions = self.data, self.data.get("versions", self.data)
        layers = {True: ", prepacked", False: ", stock layers"}.get(data.get("packed", self.asked.get("pack")), "")
        software = f"torch {versions['torch']}, Transformers {versions['transformers']}"
        asked_for_pages = "hugetlb=1" in data.get("environment", {}).get("GLIBC_TUNABLES", "")
        pages = ", huge pages" if asked_for_pages or data.get("huge_page_mib") else ""
        return f"{data['device']}, {data['dtype']}, threads: {data['threads']}{layers}{pages}, {software}"

    def summaries(self, temperature: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Dataset, and `all`, -> method -> its row."""
        return {
            DATASETS.get(dataset, dataset): {r["method"]: r for r in rows if r["temperature"] == float(temperature)}
            for dataset, rows in self.data["summaries"].items()
        }


def table(left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of words, then columns of numbers."""
    lines = [[*left, *right], ["---"] * len(left) + ["---:"] * len(right), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def named(method: str) -> str:
    """A method or a head in the words of the page."""
    if method.endswith(COMPILED):
        return named(method.removesuffix(COMPILED)) + COMPILED
    if method.startswith("Re-SpS"):
        return "Re-SpS, published" if method.endswith("-paper") else "Re-SpS, repaired"
    return "`auto`, fitted" if method.startswith("policy ") else WORDS.get(method, method)


def overview(found: list[Results], temperature: str) -> str:
    """Of `resps bench`, a row for each file: what decides, and how much faster than plain decoding."""
    compiled = [f"plain{COMPILED}", f"auto{COMPILED}"]
    compiled = [method for method in compiled if any(method in one.summaries(temperature)["all"] for one in found)]
    starts, rows = (*STARTS, "oracle", *compiled), []
    for one in found:
        methods, costs = one.summaries(temperature)["all"], one.data["costs"]["verify"]["128"]
        amount = f"{len(one.asked['prompts'])}, {one.asked['max_new_tokens']}, {one.asked['repeats']}"
        cells = [two(costs["8"] / costs["1"]), f"{methods['plain']['tokens_per_second']:.1f}"]
        ratios = (next((r["ratio"] for m, r in methods.items() if m.startswith(start)), None) for start in starts)
        rows.append([one.target, one.link, amount, *cells, *map(two, ratios), INTERVAL.format(**methods["auto"])])
    right = ["8 nodes", "plain, tokens/s", *COLUMNS, "*oracle*", *map(named, compiled), "`auto`, 95% interval"]
    return table(["target", "results file", "prompts, tokens, repeats"], right, rows)


def by_dataset(found: list[Results], value: str, temperature: str) -> str:
    """Of `resps bench`: `ratio` with its interval, or `tau` with what of it became speed."""
    [one] = found
    datasets, rows = one.summaries(temperature), []
    has_compiled = value == "tau" and f"plain{COMPILED}" in datasets["all"]
    for method, whole in datasets["all"].items():
        if method != "plain" and (whole["measured"] or value == "ratio"):
            last = [INTERVAL.format(**whole) if value == "ratio" else two(whole["ratio"] / whole["tau"])]
            last += [two(whole["compiled_efficiency"])] if has_compiled else []
            rows.append([named(method), *(two(methods[method][value]) for methods in datasets.values()), *last])
    right = ["95% interval" if value == "ratio" else "speed-up / tau"]
    return table(["method"], [*datasets, *right, *(["over compiled plain / tau"] if has_compiled else [])], rows)


def compiled(found: list[Results], temperature: str) -> str:
    """Of `resps bench --compile`, over all datasets: every method against plain decoding, eager and compiled."""
    [one] = found
    rows = []
    for method, row in one.summaries(temperature)["all"].items():
        values = [row[name] for name in ("ratio", "compiled_ratio", "tau", "compiled_efficiency")]
        rate, interval = f"{row['tokens_per_second']:.1f}", INTERVAL.format(**row) if method != "plain" else ""
        rows.append([named(method), rate, two(values[0]), interval, *map(two, values[1:])])
    over = ["over compiled plain", "tau", "over compiled plain / tau"]
    return table(["method"], ["tokens/s", "over plain", "95% interval", *over], rows)


def engine(found: list[Results]) -> str:
    """Of `training.studies.engine_speed`: what of tau became speed, eager and compiled, each against its own plain."""
    rows = []
    for one in found:
        ways = {(row["model"], row["way"]): row for row in one.data["rows"]}
        for (model, way), row in ways.items():
            if way.endswith(COMPILED):
                continue
            cells = _engine_cells(row, "ratio", "efficiency")
            also = ways.get((model, way + COMPILED))
            cells += [""] * 4 if also is None else _engine_cells(also, "compiled_ratio", "compiled_efficiency")
            rows.append([model, one.link, way.removeprefix("tree ").replace("auto", "`auto`"), *cells])
    numbers = ["tokens/s", "tau", "ratio to plain", "that / tau"]
    compiled_numbers = ["compiled tokens/s", "tau", "ratio to compiled plain", "that / tau"]
    return table(["target", "results file", "method"], [*numbers, *compiled_numbers], rows)


def _engine_cells(row: dict[str, Any], ratio: str, efficiency: str) -> list[str]:
    return [f"{row['tokens_per_second']:.1f}", *(two(row[name]) for name in ("tau", ratio, efficiency))]


def head_alone(found: list[Results]) -> str:
    """Of `training.studies.measure_tau`."""
    measured = [(one, row) for one in found for row in one.data["rows"]]
    rows = [[o.target, o.link, r["shape"], *map(two, r["tau"].values()), two(r["mean"])] for o, r in measured]
    return table(["target", "results file", "tree"], [*DATASETS.values(), "mean"], rows)


def bad_head(found: list[Results]) -> str:
    """Of `training.studies.guard_speed`."""
    rows = [
        [named(row["head"]), named(row["policy"]), ("no", "yes")[row["kept"]], two(row["tau"]), two(row["to_plain"])]
        for one in found
        for row in one.data["rows"]
    ]
    return table(["head", "guarded policy", "kept between calls"], ["tau", "ratio"], rows)


def batches(found: list[Results], *sizes: str) -> str:
    """Of `training.studies.batches` and `training.studies.planted_batches`: ratios to the same plain batch."""
    rows = []
    for one in found:
        cells: dict[tuple[str, str], dict[str, float]] = {}
        for row in one.data["rows"]:
            kind = (one.asked["shape"] or "auto", row["way"]) if "way" in row else (row["policy"], "ragged")
            cells.setdefault(kind, {})[str(row["batch_size"])] = row["to_plain_batch"]
        start = [DATASETS[Path(one.asked["dataset"]).stem], one.link]
        for (tree, way), own in cells.items():
            if "plain" not in (tree, way) and "one by one" not in way:
                drafted = "" if way == "stock" else named(tree)
                rows.append([*start, drafted, named(way), *(two(own.get(size)) for size in sizes)])
    return table(["prompts", "results file", "tree", "rows"], [f"batch of {size}" for size in sizes], rows)


def forward_costs(found: list[Results]) -> str:
    """Of `resps bench`: the costs that it measured before it began, relative to a forward over one node."""
    counts, rows = ("2", "4", "8", "16", "32"), []
    for one in found:
        for context, own in one.data["costs"]["verify"].items():
            plain = one.data["costs"]["plain"][context]
            ratios = [two(own[count] / own["1"]) for count in counts]
            rows.append([one.target, one.link, context, two(plain / own["1"]), *ratios])
    right = ["plain `generate` / 1 node", *(f"{count} nodes / 1 node" for count in counts)]
    return table(["target", "results file", "context"], right, rows)


def same_outputs(found: list[Results]) -> str:
    """Of `resps bench`: how many outputs of each method equal those of plain decoding to the last token."""
    rows = []
    for one in found:
        same = one.data["same_text"]
        counts = (next((same[m] for m in same if m.startswith(start)), "") for start in STARTS)
        rows.append([one.target, one.link, str(one.asked["max_new_tokens"]), str(same["plain"]), *map(str, counts)])
    return table(["target", "results file"], ["new tokens", "outputs", *COLUMNS], rows)


MAKERS = (overview, by_dataset, compiled, head_alone, engine, bad_head, batches, forward_costs, same_outputs)


def fill(mark: str, page: Path) -> str:
    """Conditions, each once with the files that share them, and the table."""
    kind, *words = mark.split()
    found, options = [Results.load(w, page) for w in words if ".json" in w], [w for w in words if ".json" not in w]
    files = {one.conditions: [o.link for o in found if o.conditions == one.conditions] for one in found}
    wrap = textwrap.TextWrapper(119, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    captions = [wrap.fill(f"- {', '.join(links)}: {conditions}.") for conditions, links in files.items()]
    maker = next(maker for maker in MAKERS if maker.__name__ == kind)
    return "\n".join([*captions, "", maker(found, *options)])


def render(page: Path) -> str:
    """The page with all of its tables written anew."""
    return MARK.sub(lambda mark: f"{mark[1]}\n{fill(mark[2], page)}\n\n{mark[3]}", page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(render(written), encoding="utf-8")
