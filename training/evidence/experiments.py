"""What is measured: the experiments of `training/PROTOCOL.md` with their arms, and what each takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.benchmarking.peers import LLAMA_CPP_WAYS, OPENVINO_WAYS
from training.benchmarking.peers import VLLM_WAYS as VLLM

from .prompts import CATEGORIES


STOCK, PLAIN, STOCK_LOOKUP = "stock", "plain", "stock's prompt lookup"
STOCK_COMPILED = "stock, compiled"
FIXED, AUTO, FITTED = "best fixed tree", "`auto`", "`auto`, fitted"
PUBLISHED, REPAIRED = "Re-SpS, published", "Re-SpS, repaired"
ORACLE = "oracle"
OPENVINO, (LLAMA_CPP,) = OPENVINO_WAYS[0], LLAMA_CPP_WAYS[0]
RANDOM_HEAD, USELESS_MEMORY, EXACT = "`auto`, random head", "`auto`, useless memory", "`auto`, exact"
EXACT_PLAIN, EXACT_MEMORY, EXACT_BLOCK = (
    "plain, exact",
    "`auto` with a memory, exact",
    "`auto` with a block head, exact",
)

POLICIES = (PLAIN, FIXED, AUTO, FITTED, PUBLISHED, REPAIRED)
ENGINES = (STOCK, PLAIN, STOCK_COMPILED, STOCK_LOOKUP, AUTO, *OPENVINO, *VLLM, LLAMA_CPP)
# Targets in few bits, by arm: how they are loaded, and the arm of a bfloat16 target that is the same otherwise.
FEW_BITS = {f"{kind}, {arm}": (kind, arm) for kind in ("int8", "int4") for arm in (PLAIN, AUTO)}
SELF, SELF_LOOKUP = '"self" alone', '"self" and lookup'
QUANTIZED = (
    PLAIN, AUTO, *FEW_BITS, SELF, SELF_LOOKUP,
    *(name for bits in (8, 4) for name in (*OPENVINO_WAYS[bits], *LLAMA_CPP_WAYS[bits])),
)  # fmt: skip
HOLDING = (STOCK, PLAIN, AUTO, f"int8, {PLAIN}", *OPENVINO)
BUDGETS = (4, 8, 16, 32, 64)
TREES = (PLAIN, *(f"{kind} of {nodes}" for nodes in BUDGETS for kind in ("chain", "tree")))
QUESTIONS = {
    1: "Is it the same text?",
    2: "Does a policy beat fixed trees?",
    3: "Is it faster?",
    4: "Do trees over block heads gain more?",
    5: "Is it never slower?",
}

# Tokens a second of SmolLM2 on two quiet Zen 4 cores, to tell beforehand how long a run takes; Qwen takes 2.5 times as
# long. Re-SpS as published verifies 32 nodes or more.
_RATES = {STOCK: 20.0, STOCK_LOOKUP: 29.0, STOCK_COMPILED: 25.0, PLAIN: 85.0, AUTO: 130.0, FIXED: 110.0, FITTED: 130.0,
          REPAIRED: 110.0, PUBLISHED: 50.0, OPENVINO[0]: 50.0, **dict.fromkeys(FEW_BITS, 130.0)}  # fmt: skip
_RATE, _SLOWER = 60.0, {"smollm2": 1.0, "qwen": 2.5, "random": 1.0}
_TURNS = 1.13  # of a prompt
_READ = 250.0  # tokens of a long prompt that are read in a second
_OF_A_BATCH = 0.4  # times as long as alone, a row of eight
_START = 75.0  # seconds of a process: to probe, load, compile or load compiled code, and warm up
_SEARCH = 75.0  # seconds in which the best fixed tree of an experiment is found, once for all of its processes

TIMED, TEXTS, SAMPLES, ANSWERS, REPLAY = "timed", "texts", "samples", "answers", "replay"
MEMORY = "memory"
SAMPLED = 100  # texts of each arm and prompt at temperature 1
COSTS = ("Zen 4", "H100", "A100")  # planted


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row of a table.

    Attributes:
        name: of its results files.
        question: of `QUESTIONS`.
        title: in the table.
        target: "smollm2", "qwen", or "random" for random weights that read 32k tokens.
        arms: the first is the one that the others are compared with.
        kind: `TIMED`; `TEXTS` compares texts, `SAMPLES` sampled ones, `ANSWERS` those of GSM8K, `REPLAY` decides again
            under planted costs, `MEMORY` notes the most that a process holds; these are not timed.
        costs: of `COSTS`, for `REPLAY`.
        drafts: who drafts for our arms.
        context: tokens of random prompts; 0 for the prompts of the protocol.
        each: prompts of each category, or of all where there are no categories.
        tokens: new ones of an answer, at most.
        neighbour: whether another process disturbs it.
    """

    name: str
    question: int
    title: str
    target: str
    arms: Sequence[str]
    kind: str = TIMED
    drafts: str = "head and lookup"
    temperature: float = 0.0
    batch: int = 1
    context: int = 0
    each: int = 1
    tokens: int = 96
    processes: int = 2
    neighbour: bool = False
    costs: str = ""

    @property
    def is_timed(self) -> bool:
        return self.kind == TIMED

    @property
    def is_judged(self) -> bool:
        """Whether its processes must be quiet: they are timed, and nothing disturbs them on purpose."""
        return self.is_timed and not self.neighbour

    @property
    def prompts(self) -> int:
        """How many prompts it asks, of ours."""
        if self.context:
            return 2
        by_category = (
            self.kind not in (ANSWERS, MEMORY) and EXACT_PLAIN not in self.arms and self.name != "other-domain"
        )
        return self.each * (len(CATEGORIES) if by_category else 1)

    @property
    def minutes(self) -> float:
        """Estimate what all of its processes take on two quiet cores."""
        if self.kind == SAMPLES:
            return 3 * SAMPLED * self.prompts * self.tokens / 50.0 / 60
        seconds = sum(self.tokens / _RATES.get(arm, _RATE) + self.context / _READ for arm in self.arms)
        seconds *= _SLOWER[self.target] * (_OF_A_BATCH if self.batch > 1 else _TURNS)
        search = _SEARCH * _SLOWER[self.target] * (self.is_timed and FIXED in self.arms)
        return (search + self.processes * (_START + self.prompts * seconds)) / 60

    def quick(self) -> "Experiment":
        """As `make evidence-quick` runs it: it proves nothing."""
        return replace(self, each=1, tokens=min(self.tokens, 32), processes=1, context=min(self.context, 1024))


def _policies() -> list[Experiment]:
    found = []
    for target, called, each in (("smollm2", "SmolLM2", 2), ("qwen", "Qwen", 1)):
        for heat in (0.0, 1.0):
            name, title = f"policy-{target}-t{heat:g}", f"{called}, temperature {heat:g}"
            found.append(Experiment(name, 2, title, target, POLICIES, temperature=heat, each=each))
    short = {"head": "head alone", "memory": "head and memory", "block": "block head"}
    found += [
        Experiment(f"policy-smollm2-{name}", 2, f"SmolLM2, {drafts}", "smollm2", POLICIES, drafts=drafts, each=2)
        for name, drafts in short.items()
    ]
    batch = (PLAIN, FIXED, AUTO, FITTED)
    found.append(Experiment("policy-smollm2-batch4", 2, "SmolLM2, batch 4", "smollm2", batch, batch=4, each=4))
    return found + [
        Experiment(
            f"planted-smollm2-{costs.lower().replace(' ', '')}", 2, f"SmolLM2, planted costs: {costs}", "smollm2",
            (*POLICIES, ORACLE), REPLAY, costs=costs, processes=1,
        )
        for costs in COSTS
    ]  # fmt: skip


def _never_slower() -> list[Experiment]:
    lengths = [
        Experiment(
            f"length-{context}", 5, f"random weights, {context:,} tokens", "random", (PLAIN, RANDOM_HEAD),
            context=context, tokens=128,
        )
        for context in (1024, 4096, 16384)
    ]  # fmt: skip
    hard = (PLAIN, RANDOM_HEAD, USELESS_MEMORY)
    return [
        Experiment("hard-drafters", 5, "SmolLM2, drafters that are no use", "smollm2", hard),
        Experiment(
            "other-domain", 5, "SmolLM2, languages that its head never read", "smollm2", (PLAIN, AUTO), each=10
        ),
        Experiment("neighbour", 5, "SmolLM2, a noisy neighbour", "smollm2", (PLAIN, AUTO), neighbour=True),
        *lengths,
    ]


EXPERIMENTS = (
    Experiment(
        "exact-smollm2", 1, "exact mode, SmolLM2", "smollm2", (EXACT_PLAIN, EXACT, EXACT_MEMORY, EXACT_BLOCK), TEXTS,
        batch=8, each=160, tokens=256, processes=1,
    ),
    Experiment(
        "exact-qwen", 1, "exact mode, Qwen", "qwen", (EXACT_PLAIN, EXACT), TEXTS, batch=8, each=80, tokens=256,
        processes=1,
    ),
    Experiment(
        "normal-smollm2", 1, "normal mode, SmolLM2", "smollm2", (STOCK, STOCK_LOOKUP, AUTO), TEXTS, processes=1,
    ),
    Experiment(
        "samples-smollm2", 1, "temperature 1, SmolLM2", "smollm2", (STOCK, "stock, other seeds", AUTO), SAMPLES,
        temperature=1.0, tokens=8, processes=1,
    ),
    Experiment(
        "gsm8k-qwen", 1, "GSM8K, Qwen", "qwen", (STOCK, AUTO, EXACT), ANSWERS, batch=4, each=48, tokens=320,
        processes=1,
    ),
    *_policies(),
    Experiment("engines-smollm2", 3, "SmolLM2", "smollm2", ENGINES),
    Experiment("engines-qwen", 3, "Qwen", "qwen", ENGINES),
    Experiment("quantized-smollm2", 3, "SmolLM2 in few bits", "smollm2", QUANTIZED, each=2, processes=1),
    Experiment("quantized-qwen", 3, "Qwen in few bits", "qwen", QUANTIZED, each=2, processes=1),
    Experiment("memory-smollm2", 3, "SmolLM2", "smollm2", HOLDING, MEMORY, each=4, processes=1),
    Experiment("memory-qwen", 3, "Qwen", "qwen", HOLDING, MEMORY, each=4, processes=1),
    Experiment("budgets-smollm2", 4, "SmolLM2", "smollm2", TREES, drafts="block head"),
    *_never_slower(),
)  # fmt: skip
# Small ones are run of these, where none is named.
QUICK = ("normal-smollm2", "policy-smollm2-t0", "engines-smollm2", "hard-drafters", "length-1024")
DRIFTING = ("engines-smollm2", "engines-qwen")  # whose ratios over stock tell whether figures still hold


def experiments(mode: str = "") -> list[Experiment]:
    """Return all of the protocol, with "quick" small ones, with "drift" those that are measured again."""
    if mode == "quick":
        return [one.quick() for one in EXPERIMENTS]
    if mode == "drift":
        return [replace(one, arms=(STOCK, PLAIN, AUTO), processes=1) for one in EXPERIMENTS if one.name in DRIFTING]
    return list(EXPERIMENTS)
