"""The ways to decode that an experiment compares, made of the models that a machine has."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CompileConfig, TorchAoConfig

from training.benchmarking.peers import LLAMA_CPP_WAYS, OPENVINO_WAYS, check_installed, load_peers, vllm_peers
from training.benchmarking.provenance import config_sha256, weights_sha256
from training.studies.random_target import random_target
from transformers_resps import AutoPolicy, BaselineGuard, DraftHead, Policy, SuffixMemory, TreeShape, attach
from transformers_resps.compilation.native import keeps_rows_apart
from transformers_resps.drafting import DraftSource
from transformers_resps.generation.keywords import SpeculationDefaults
from transformers_resps.generation.output import sampling
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Observation, PolicyWrapper
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tools.loading import load_source, load_target
from transformers_resps.tools.methods import (
    Answer,
    Generate,
    Method,
    compiled,
    fixed_tree,
    invariant,
    plain,
    plain_steps,
    prompt_lookup,
)

from . import experiments as named
from .experiments import Experiment


CARDS = Path("model_cards")
CALLED = {"smollm2": "smollm2-135m-instruct", "qwen": "qwen2.5-coder-0.5b-instruct"}
SAVED = {named.FITTED: "throughput", named.PUBLISHED: "policy-paper"}
LEARNED = (*SAVED, named.REPAIRED)
REPAIRED = Path("training/evidence/policies")  # trained at the costs of compiled steps
CANDIDATES = tuple(  # that the best fixed tree is found among; on a CPU wide trees cost what they gain
    TreeShape(*shape, lookup)
    for shape in ((3, 2, 1), (4, 3, 1), (6, 5, 1), (4, 2, 2), (6, 2, 4), (8, 3, 4), (12, 4, 4), (16, 5, 4))
    for lookup in (0, 4)
)
_FORGETTABLE = 20_000  # random tokens of a useless memory
_GROUP = 64  # inputs that share a scale in int4, as in OpenVINO's


class HeadAlone(ThroughputPolicy):
    """Drafts as "auto" does, without prompt lookup."""

    uses_lookup = False

    def choose(self, observation: Observation) -> TreeShape:
        return super().choose(replace(observation, prefix_accept_probs=list))


class LeftOut(ValueError):  # noqa: N818 - no failure: an empty cell, with its reason
    """An arm, or all of an experiment, that this machine cannot measure."""


class Kept(PolicyWrapper):
    """Learns on from answer to answer, until it begins anew: a benchmark copies other policies for each answer."""

    def __init__(self, make: Callable[[], Policy]) -> None:
        super().__init__(make())
        self._make = make

    def renew(self) -> None:
        self.policy = self._make()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return self


@dataclass(frozen=True)
class StockCompiled(Method):
    """`generate` as its documentation compiles it: with a static cache, and on a CPU only if it is told to.

    Every text that is longer than all before makes another cache, which compiles again: so it is written once before.
    """

    lengths: list[int] = field(default_factory=lambda: [0])

    @property
    def reports_steps(self) -> bool:
        return True  # a hook that notes when forwards begin would be compiled with the layers

    def prepare(
        self, target: Any, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]
    ) -> Callable[[], Answer]:
        asked = CompileConfig(mode="default", fullgraph=False)
        asked._compile_all_devices = True
        keywords = {"cache_implementation": "static", "compile_config": asked, **sampling(temperature)}

        def answer() -> Answer:
            with SpeculationDefaults.suspended():
                mask = torch.ones_like(input_ids)
                ids = target.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **keywords)
            tokens = ids[0, input_ids.shape[1] :].tolist()
            return Answer(tokens, target_forwards=len(tokens))

        if input_ids.shape[1] + max_new_tokens > max(self.lengths):
            self.lengths.append(input_ids.shape[1] + max_new_tokens)
            answer()
        return answer


@dataclass(frozen=True)
class OnAnother(Generate):
    """Decodes with its own target, in place of the benchmark's."""

    target: Any = None

    def prepare(self, target: Any, *asked: Any) -> Callable[[], Answer]:
        return super().prepare(self.target, *asked)


def load_quantized(folder: str, kind: str) -> Any:
    """Load a target with weights in "int8" or "int4", and its output head in int8: torchao leaves a tied one as is."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    if kind == "int4":
        kind = json.dumps(TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(_GROUP))).to_dict())
    target = load_target(folder, "bfloat16", "cpu", quantization=kind)
    output = target.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.clone(), requires_grad=False)  # no longer the embedding's
    quantize_(output, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    return attach(target)


@dataclass(frozen=True, slots=True)
class Models:
    """What an experiment decodes with.

    Attributes:
        target: attached.
        tokenizer: of the target; `None` for random weights.
        source: drafts for our arms; a `DraftHead`, or a block head.
        folders: kind -> folder, of everything that was loaded.
        in_few_bits: "int8" or "int4" -> the same with that target.
    """

    target: Any
    tokenizer: Any
    source: DraftSource
    folders: dict[str, str]
    in_few_bits: "dict[str, Models]" = field(default_factory=dict)

    @classmethod
    def load(cls, experiment: Experiment, options: Any) -> "Models":
        """Load them in bfloat16. Raises `LeftOut` for what this machine lacks."""
        if experiment.target == "random":
            target: Any = random_target("0.1b", torch.bfloat16, "cpu")
            target.config.max_position_embeddings = max(target.config.max_position_embeddings, 1 << 15)
            return cls(attach(target), None, DraftHead.from_target(target, draft_vocab_size=8192).eval(), {})
        folder = {"smollm2": options.target, "qwen": options.qwen}[experiment.target]
        if folder is None:
            raise LeftOut(f"no weights of {CALLED[experiment.target]} were given (`--{experiment.target}`)")
        head = str(CARDS / f"{CALLED[experiment.target]}-head")
        if experiment.drafts == "block head":
            if options.block_head is None:
                raise LeftOut("no block head was given (`--block-head`)")
            head = options.block_head
        target = attach(load_target(folder, "bfloat16", "cpu"))
        source = load_source(head, target)
        assert source is not None
        return cls(target, AutoTokenizer.from_pretrained(folder), source, {"target": folder, "head": head})

    def quantized(self, kind: str) -> "Models":
        """Return these models with a target in few bits, which is loaded once."""
        if kind not in self.in_few_bits:
            target = load_quantized(self.folders["target"], kind)
            source = load_source(self.folders["head"], target)
            assert source is not None
            self.in_few_bits[kind] = replace(self, target=target, source=source)
        return self.in_few_bits[kind]

    def identity(self) -> dict[str, Any]:
        """Hashes of weights and configs of what was loaded."""
        folders = self.folders.items()
        return {kind: [weights_sha256(folder), config_sha256(folder)] for kind, folder in folders}


def assistants(models: Models, drafts: str) -> dict[str, Any]:
    """Return the keyword that says who drafts; a memory begins empty, and remembers the answers of its own arm."""
    if drafts in (named.SELF, named.SELF_LOOKUP):
        return {"assistant_model": load_source("self", models.target)}
    return {"assistant_model": [models.source, SuffixMemory()] if drafts == "head and memory" else models.source}


def auto(models: Models, drafts: str) -> Generate:
    """Return the policy "auto", new."""
    make = (lambda: BaselineGuard(HeadAlone())) if drafts.endswith(" alone") else default_policy
    return Generate(named.AUTO, {**assistants(models, drafts), "policy": Kept(make)})


def fixed(experiment: Experiment, models: Models, shape: TreeShape) -> Generate:
    """Return a fixed tree, compiled, which whoever drafts in the experiment fills."""
    tree = fixed_tree(models.source, shape)
    return compiled(replace(tree, keywords={**tree.keywords, **assistants(models, experiment.drafts)}))


def candidates(experiment: Experiment, models: Models) -> dict[TreeShape, Method]:
    """Return the fixed trees of which the fastest on other prompts becomes an arm."""
    looks_up = {"head alone": (False,), "head and memory": (True,)}.get(experiment.drafts, (False, True))
    return {shape: fixed(experiment, models, shape) for shape in CANDIDATES if (shape.lookup > 0) in looks_up}


def arms_of(
    experiment: Experiment, models: Models, best: TreeShape | None, options: Any, running: ExitStack
) -> tuple[dict[str, Method], dict[str, str]]:
    """Make each arm, new.

    Args:
        experiment: names them.
        models: decode.
        best: the best fixed tree; `None` if none was searched.
        options: of the command.
        running: ends the processes of other engines.

    Returns:
        Arms by name, and of those that cannot be measured the reasons.
    """
    made, left_out = _peers(experiment, models, options, running)
    for name in experiment.arms:
        if name in made or name in left_out:
            continue
        try:
            made[name] = replace(_arm(name, experiment, models, best, options), name=name)
        except (LeftOut, ValueError, OSError, ImportError) as error:
            left_out[name] = str(error).split("\n")[0]
    return made, left_out


def _arm(name: str, experiment: Experiment, models: Models, best: TreeShape | None, options: Any) -> Method:
    drafts, exact = experiment.drafts, partial(_exact, models.target.dtype)
    plainly: dict[str, Callable[[], Method]] = {
        named.STOCK: plain,
        "stock, other seeds": plain,
        named.PLAIN: lambda: compiled(plain_steps()),
        named.STOCK_COMPILED: lambda: StockCompiled(named.STOCK_COMPILED),
        named.STOCK_LOOKUP: prompt_lookup,
        named.AUTO: lambda: compiled(auto(models, drafts)),
        named.EXACT_PLAIN: lambda: exact(plain_steps()),
        named.EXACT: lambda: exact(auto(models, drafts)),
        named.EXACT_MEMORY: lambda: exact(auto(models, "head and memory")),
        named.SELF: lambda: compiled(auto(models, name)),
        named.SELF_LOOKUP: lambda: compiled(auto(models, name)),
        named.RANDOM_HEAD: lambda: compiled(_random_head(models)),
        named.USELESS_MEMORY: lambda: compiled(_useless_memory(models)),
    }
    if name in plainly:
        return plainly[name]()
    if name in named.FEW_BITS:
        kind, arm = named.FEW_BITS[name]
        other = models.quantized(kind)
        method = _arm(arm, experiment, other, best, options)
        assert isinstance(method, Generate)
        return OnAnother(name, keywords=method.keywords, target=other.target)
    if name == named.EXACT_BLOCK:
        if options.block_head is None:
            raise LeftOut("no block head was given (`--block-head`)")
        block = load_source(options.block_head, models.target)
        return exact(Generate(name, {"assistant_model": block, "policy": Kept(default_policy)}))
    if experiment.kind == named.REPLAY and name in (named.FIXED, named.ORACLE):  # stands for what is replayed
        return compiled(plain_steps())
    if name == named.FIXED:
        if best is None:
            raise LeftOut("no tree was searched")
        return fixed(experiment, models, best)
    if name in LEARNED:
        return compiled(_saved(name, experiment, models))
    return compiled(_budget(name, models))


def _exact(dtype: torch.dtype, method: Generate) -> Generate:
    """Put a method into the exact mode, compiled where a processor keeps rows apart in compiled code."""
    return invariant(compiled(method) if keeps_rows_apart(dtype) else method)


def _saved(name: str, experiment: Experiment, models: Models) -> Generate:
    called = CALLED[experiment.target]
    folder = REPAIRED / called if name == named.REPAIRED else CARDS / f"{called}-{SAVED[name]}"
    if experiment.drafts == "block head":
        raise LeftOut("no such policy was trained for a block head")
    if experiment.drafts == "head alone" and name == named.FITTED:
        raise LeftOut("it was fitted for head and lookup")
    if not folder.is_dir():
        raise LeftOut("no such policy was trained for this target")
    policy = AutoPolicy.from_pretrained(folder)
    if experiment.drafts == "head and memory" and not policy.uses_lookup:
        raise LeftOut("it never looks anything up")
    models.folders[name] = str(folder)
    return Generate(name, {**assistants(models, experiment.drafts), "policy": policy})


def _random_head(models: Models) -> Generate:
    """Of the same sizes; its embedding and vocabulary are real."""
    head = models.source
    if models.tokenizer is not None:
        assert isinstance(head, DraftHead)
        torch.manual_seed(0)
        real = {"draft_token_ids": head.draft_token_ids, "feature_layers": head.config.feature_layers}
        head = DraftHead.from_target(models.target, **real).eval()
    return Generate(named.RANDOM_HEAD, {"assistant_model": head, "policy": Kept(default_policy)})


def _useless_memory(models: Models) -> Generate:
    memory, drawn = SuffixMemory(), random.Random(0)
    size = models.target.config.get_text_config().vocab_size
    memory.add([[drawn.randrange(size) for _ in range(200)] for _ in range(_FORGETTABLE // 200)])
    keywords = {"assistant_model": [models.source, memory], "policy": Kept(default_policy)}
    return Generate(named.USELESS_MEMORY, keywords)


def _peers(
    experiment: Experiment, models: Models, options: Any, running: ExitStack
) -> tuple[dict[str, Method], dict[str, str]]:
    """Start each other engine that the experiment asks for, once. One that does not start takes no other with it."""
    found: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    libraries = [
        (names, partial(_library, library, bits))
        for library, ways in (("openvino", OPENVINO_WAYS), ("llama.cpp", LLAMA_CPP_WAYS))
        for bits, names in ways.items()
    ]
    for names, start in (*libraries, *(((name,), partial(_vllm, (name,))) for name in named.VLLM)):
        if names[0] in experiment.arms:
            try:
                found |= {peer.name: peer for peer in start(models, options, running)}
            except (ValueError, OSError, ImportError) as error:
                left_out |= dict.fromkeys(names, str(error).split("\n")[0])
    return found, left_out


def _library(name: str, bits: int, models: Models, options: Any, running: ExitStack) -> Sequence[Method]:
    check_installed([name])
    return load_peers([name], models.target, bits)


def _vllm(names: Sequence[str], models: Models, options: Any, running: ExitStack) -> Sequence[Method]:
    if options.vllm is None:
        raise LeftOut("vLLM's Python was not given (`--vllm`)")
    assert isinstance(models.source, DraftHead)
    peers, _ = running.enter_context(vllm_peers(Path(options.vllm), models.target, models.source, names))
    return peers


def _budget(name: str, models: Models) -> Generate:
    """A "chain of 8" or "tree of 8": nodes with the root, as deep as the block allows."""
    kind, _, count = name.partition(" of ")
    nodes, levels = int(count), int(models.source.config.levels)  # type: ignore[attr-defined]
    if int(count) not in named.BUDGETS:
        raise LeftOut(f"there is no arm {name}")
    if kind == "chain" and nodes - 1 > levels:
        raise LeftOut(f"a chain has at most {levels} drafted tokens, as many as the head's block")
    shape = (
        TreeShape(nodes, nodes - 1, 1) if kind == "chain" else TreeShape(nodes, min(levels, nodes - 1), min(nodes, 32))
    )
    return fixed_tree(models.source, shape)
