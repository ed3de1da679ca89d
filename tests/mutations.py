"""Plants real bugs, one at a time, in copies of the package, and tells which of them the tests notice.

    python -m tests.mutations            # all; or the numbers of some: python -m tests.mutations 3 7

The working tree is never touched. Exit status: 0 when every bug is caught, otherwise 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
CALLS = "tests/generation/test_any_call.py"
_TREES = "tests/decoding/test_any_tree.py::test_"
POOL = _TREES + "a_tree_keeps_the_best_of_a_pool_and_orphans_nobody"
CHILD = _TREES + "a_child_is_the_first_that_carries_the_token"
SIGHT = _TREES + "a_node_sees_the_prefix_and_its_own_path"
WINDOW = _TREES + "a_sliding_layer_shows_the_end_of_a_nodes_own_text"
CHAIN = _TREES + "a_merged_chain_adds_its_texts_and_nothing_else"
WALK = _TREES + "acceptance_is_the_brute_force_walk"
ROWS = _TREES + "rows_commit_what_the_shortest_run_allows"
GREEDY = "tests/decoding/test_accept_greedy.py"
KEPT = _TREES + "the_cache_keeps_the_accepted_path_and_forgets_the_rest"
MAX_SECONDS = 600  # a bug may also make a loop endless


@dataclass(frozen=True)
class Mutation:
    """A bug: `right` stands once in `file` of the package and becomes `wrong`; `tests` are the ones to notice."""

    bug: str
    file: str
    right: str
    wrong: str
    tests: str

    def plant(self, package: Path) -> None:
        """Write the bug into a copy of the package.

        Raises:
            ValueError: the code has changed so that the bug has no place.
        """
        file = package / self.file
        text = file.read_text(encoding="utf-8")
        if text.count(self.right) != 1:
            raise ValueError(
                f"{self.file} has {text.count(self.right)} times `{self.right}`, but the bug '{self.bug}' needs it "
                "once. Give it the text that does this now in tests/mutations.py."
            )
        file.write_text(text.replace(self.right, self.wrong), encoding="utf-8")


MUTATIONS = (
    Mutation("kept nodes stand in order of score", "tree.py", "[:, :kept].sort(dim=-1).values", "[:, :kept]", POOL),
    Mutation("a child of any node will do", "tree.py", "(parents[node], tokens[node])", "(0, tokens[node])", CHILD),
    Mutation(
        "the root is its own child",
        "tree.py",
        "range(self.node_count - 1, 0, -1)",
        "range(self.node_count - 1, -1, -1)",
        CHILD,
    ),
    Mutation("the deepest nodes lack an ancestor", "tree.py", "range(most_levels):", "range(most_levels - 1):", POOL),
    Mutation("a node is no ancestor of itself", "tree.py", "own | ancestors.gather", "ancestors.gather", SIGHT),
    Mutation("a merged chain becomes a star", "tree.py", "parents.append(node)", "parents.append(0)", CHAIN),
    Mutation("a merged chain is shared with cousins", "tree.py", " and parents[i] == node", "", CHAIN),
    Mutation(
        "the walk descends from the root again",
        "decoding/acceptance.py",
        "zip(nodes, tokens.tolist(), strict=True)",
        "zip([0] * len(nodes), tokens.tolist(), strict=True)",
        WALK,
    ),
    Mutation(
        "every pick is the root's",
        "decoding/acceptance.py",
        "commit(_logits_at(rows, nodes, logits))",
        "commit(_logits_at(rows, [0] * len(nodes), logits))",
        WALK,
    ),
    Mutation("the walk goes on after the end", "decoding/acceptance.py", "if text.finished or ", "if ", WALK),
    Mutation(
        "one row with the draft is enough",
        "decoding/acceptance.py",
        "if any(live and node is None",
        "if all(live and node is None",
        ROWS,
    ),
    Mutation(
        "rows walked together pass their end",
        "decoding/acceptance.py",
        "if child is not None and not _is_end(texts[row], token, len(picks[row])):",
        "if child is not None:",
        GREEDY,
    ),
    Mutation(
        "sampling forgets the processors",
        "decoding/text.py",
        "scores.softmax(dim=-1)",
        "logits.softmax(dim=-1)",
        CALLS,
    ),
    Mutation(
        "only the first row's path is moved",
        "target/tree_cache.py",
        "(path == in_place)",
        "(path[0] == in_place)",
        KEPT,
    ),
    Mutation(
        "the path is looked up in the prefix",
        "target/tree_cache.py",
        "index_select(3, slots[0])",
        "index_select(3, path[0])",
        KEPT,
    ),
    Mutation(
        "only the root is kept", "target/tree_cache.py", "(cache, node_count - kept)", "(cache, node_count - 1)", KEPT
    ),
    Mutation(
        "nodes see their children",
        "target/attention.py",
        "~tree.ancestors[:, None]",
        "~tree.ancestors.mT[:, None]",
        SIGHT,
    ),
    Mutation(
        "padding is seen, and the text is not",
        "target/attention.py",
        ".masked_fill_(hidden",
        ".masked_fill_(~hidden",
        SIGHT,
    ),
    Mutation(
        "positions count nodes",
        "target/attention.py",
        "root_positions[:, None] + tree.depths",
        "root_positions[:, None] + torch.arange(tree.node_count)",
        SIGHT,
    ),
    Mutation(
        "a window is one too wide",
        "target/attention.py",
        "key_slots <= node_slots",
        "key_slots < node_slots",
        WINDOW,
    ),
    Mutation(
        "a window is noticed too late",
        "target/attention.py",
        "past + node_count > window - 1",
        "past > window - 1",
        WINDOW,
    ),
)


def copy_of(folder: Path) -> Path:
    """What the narrow tests need, in `folder`; returns the package there."""
    without = shutil.ignore_patterns("__pycache__")
    for name in ("transformers_resps", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "transformers_resps"


def failure(folder: Path, tests: str) -> str | None:
    """The first test that fails in the copy, or `None`.

    Raises:
        RuntimeError: the tests could not be run at all.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "RESPS_HYPOTHESIS_PROFILE": "mutations"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{tests} (endless)"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} could not run:\n{done.stdout}{done.stderr}")
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0] if failed else None


def is_caught(number: int, mutation: Mutation) -> bool:
    """Plant one bug, run its tests, print one line."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="resps-mutation-") as folder:
        mutation.plant(copy_of(Path(folder)))
        failed = failure(Path(folder), mutation.tests)
    found = f"caught by {failed.rpartition('/')[2]}" if failed else "SURVIVED"
    print(f"{number:2} {mutation.file:14} {mutation.bug}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
    return failed is not None


def main() -> int:
    """All bugs, after the tests have passed without any."""
    parser = argparse.ArgumentParser("tests.mutations", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, default=range(1, len(MUTATIONS) + 1), help="all by default")
    chosen = {number: MUTATIONS[number - 1] for number in parser.parse_args().numbers}
    with tempfile.TemporaryDirectory(prefix="resps-mutation-") as folder:
        copy_of(Path(folder))
        for tests in sorted({mutation.tests for mutation in chosen.values()}):
            if failed := failure(Path(folder), tests):
                print(f"{failed} fails without any bug: nothing can be learned")
                return 1
    caught = sum(is_caught(number, mutation) for number, mutation in chosen.items())
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
