"""Other libraries beside ours: counted alike, and refused where they are missing."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarking import vllm_side
from benchmarking.command import main
from benchmarking.peers import LLAMA_CPP_WAYS, MODULES, PEERS, Peer, load_peers, vllm_peers
from tests.conftest import FakeClock
from transformers_resps import DraftHead, attach
from transformers_resps.tools.methods import Answer, Bench, Prompt, plain
from transformers_resps.tools.session import Judge


PROMPTS = Path(__file__).parents[3] / "examples" / "demo" / "prompts.jsonl"
PROMPT = Prompt("a/0", torch.tensor([1, 30, 31, 30, 31, 30]))


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 12, FakeClock(tick=1.0))


def test_an_answer_of_another_library_is_counted_like_all_others(bench: Bench) -> None:
    """It may run the target's layers without the target, and write on after the end."""
    asked: list[Any] = []

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, end_ids: Sequence[int]) -> Answer:
        asked.append((input_ids.tolist(), max_new_tokens, temperature, list(end_ids)))
        bench.target.model(input_ids)
        bench.target.model(input_ids)
        return Answer([7, end_ids[0], 9, 9])

    method = Peer("other", answer, effort=6, seed_exact=False)
    bench.target.generation_config.eos_token_id = [2]
    run = Bench(bench.target, 12, FakeClock(tick=1.0)).decode(PROMPT, method, temperature=0.5)
    assert asked == [([PROMPT.input_ids.tolist()], 12, 0.5, [2])]
    assert run.token_ids.tolist() == [7, 2] and run.timing.tokens == 2 and not run.steps
    assert run.timing.target_forwards == 2 and run.timing.prefill_seconds == 2.0


def test_a_wrong_answer_of_another_library_is_reported(bench: Bench) -> None:
    one = bench.decode(PROMPT, plain())
    other = Peer("other", lambda *_: Answer(((one.token_ids + 1) % 64).tolist()), seed_exact=False)
    judge = Judge(bench.target, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other)])
    assert judge.same_text["other"] == 0 and len(judge.unexplained) == 1


@pytest.mark.parametrize("name", PEERS)
def test_a_library_that_is_not_there_is_named_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    assert main(["nowhere", "nothing", "--dataset", str(PROMPTS), "--peers", name], "") == 2
    error = capsys.readouterr().err
    extra = "llama" if name == "llama.cpp" else "peers"
    assert f"--peers needs {MODULES[name]}" in error and f"pip install '.[{extra}]'" in error


def test_a_python_that_is_not_there_is_named_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "nothing", "--dataset", str(PROMPTS), "--vllm", "/nowhere/python"], "") == 2
    assert "--vllm got /nowhere/python, which is no file. Pass the Python" in capsys.readouterr().err


class Pipeline:
    """Stands for OpenVINO GenAI's: answers with the end token after three others, and keeps what it is told."""

    made: list[tuple[Any, ...]] = []
    asked: list[tuple[Any, Any]] = []

    def __init__(self, folder: str, device: str, **options: Any) -> None:
        self.made.append((folder, device, options))

    def generate(self, input_ids: Any, settings: Any) -> Any:
        self.asked.append((input_ids, settings))
        told = SimpleNamespace(token_infer_durations=[9.0, 1.0], m_times_to_first_token=[2e6])
        tokens = [5, 6, 7, *settings.stop_token_ids]
        return SimpleNamespace(tokens=[tokens], perf_metrics=SimpleNamespace(raw_metrics=told))


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> type[Pipeline]:
    library = SimpleNamespace(LLMPipeline=Pipeline, GenerationConfig=SimpleNamespace, SchedulerConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "openvino_genai", library)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array.tolist()))  # type: ignore[arg-type]
    Pipeline.made, Pipeline.asked = [], []
    return Pipeline


def test_openvino_decodes_the_converted_target_in_its_precision_plainly_and_with_prompt_lookup(
    openvino: type[Pipeline], tiny_target: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "tiny-openvino").mkdir()
    model: Any = attach(tiny_target.bfloat16())
    model.name_or_path, model.generation_config.eos_token_id = str(tmp_path / "tiny"), [2]
    one, lookup = load_peers(["openvino"], model)
    assert (one.name, lookup.name) == ("OpenVINO (plain)", "OpenVINO (prompt lookup)")
    with pytest.raises(ValueError, match="--weight-format int8 .*tiny-openvino-int8`"):
        load_peers(["openvino"], model, 8)
    same: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    same["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    same["scheduler_config"] = SimpleNamespace(enable_prefix_caching=False)
    folder = str(tmp_path / "tiny-openvino")
    assert openvino.made == [(folder, "CPU", same), (folder, "CPU", {**same, "prompt_lookup": True})]
    bench = Bench(model, 12, FakeClock(tick=1.0))
    run = bench.decode(PROMPT, one)
    assert run.token_ids.tolist() == [5, 6, 7, 2]
    assert (run.timing.target_forwards, run.timing.prefill_seconds) == (2, 2.0)
    seeds = []
    for seed in (0, 1, 0):
        bench.decode(PROMPT, lookup, seed, 0.5)
        ids, settings = openvino.asked[-1]
        assert ids == [PROMPT.input_ids.tolist()] and settings.max_new_tokens == 12 and settings.do_sample
        assert settings.temperature == 0.5 and settings.stop_token_ids == {2} and settings.num_assistant_tokens == 10
        seeds.append(settings.rng_seed)
    assert seeds[0] == seeds[2] != seeds[1]


def test_openvino_without_a_converted_target_says_how_to_convert_it(
    openvino: type[Pipeline], tiny_target: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_target.name_or_path = str(tmp_path / "tiny")
    with pytest.raises(ValueError, match="optimum-cli export openvino --model .*tiny --task .* fp16 .*-openvino"):
        load_peers(["openvino"], tiny_target)
    (tmp_path / "tiny-openvino").mkdir()
    with pytest.raises(ValueError, match="in torch.float64. Pass `--device cpu`"):
        load_peers(["openvino"], tiny_target.double())
    assert not openvino.made


class Llama:
    """Stands for llama.cpp's: writes sevens, and after three the end; keeps what it is told."""

    told: list[Any] = []

    def __init__(self, file: str, **options: Any) -> None:
        self.told += [file, options["n_ctx"], options["n_threads"]]

    def reset(self) -> None:
        self.told.append("reset")

    def set_seed(self, seed: int) -> None:
        self.told.append(seed)

    def close(self) -> None:
        pass

    def generate(self, tokens: list[int], **sampling: Any) -> Iterator[int]:
        self.told += [tokens, sampling["temp"]]
        yield from (7, 7, 7, 2)
        raise AssertionError("asked for more than the end")


def test_llama_cpp_decodes_the_converted_target_and_keeps_nothing_between_calls(
    tiny_target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))  # type: ignore[arg-type]
    monkeypatch.setattr(Llama, "told", [])
    model: Any = attach(tiny_target)
    model.name_or_path, model.generation_config.eos_token_id = str(tmp_path / "tiny"), [2]
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf.py .*tiny --outtype f32 --outfile .*tiny\.gguf"):
        load_peers(["llama.cpp"], model)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ValueError, match=r"llama-quantize .*tiny\.gguf .*tiny-Q8_0\.gguf Q8_0`"):
        load_peers(["llama.cpp"], model, 8)
    (one,) = load_peers(["llama.cpp"], model)
    assert (one.name,) == LLAMA_CPP_WAYS[0]
    ids, bench = PROMPT.input_ids.tolist(), Bench(model, 12, FakeClock(tick=1.0))
    run = bench.decode(PROMPT, one)
    assert run.token_ids.tolist() == [7, 7, 7, 2] and run.timing.target_forwards == 4
    assert run.timing.prefill_seconds > 0
    assert Bench(model, 2, FakeClock(tick=1.0)).decode(PROMPT, one, 5, 0.5).token_ids.tolist() == [7, 7]
    *made, seed, asked, heat = Llama.told
    context = model.config.max_position_embeddings
    assert made == [str(tmp_path / "tiny.gguf"), context, torch.get_num_threads(), "reset", ids, 0.0, "reset"]
    assert (asked, heat) == (ids, 0.5) and isinstance(seed, int)


class Engine:
    """Stands for `vllm.LLM`: writes sevens, drafts once for each token of a prompt."""

    drafts = 0

    def __init__(self, model: str, **options: Any) -> None:
        assert (model, options["dtype"]) == ("target", "float32") and not options["enable_prefix_caching"]

    def get_metrics(self) -> list[SimpleNamespace]:
        made = {"vllm:spec_decode_num_drafts": {"value": self.drafts}}
        made["vllm:iteration_tokens_total"] = {"count": 2 * self.drafts}
        return [SimpleNamespace(name=name, **counted) for name, counted in made.items()]

    def generate(self, prompts: list[dict[str, Any]], sampling: SimpleNamespace, **_: Any) -> list[SimpleNamespace]:
        (prompt,) = prompts
        self.drafts += len(prompt["prompt_token_ids"])
        written = SimpleNamespace(token_ids=(7,) * sampling.max_tokens)
        return [SimpleNamespace(outputs=[written], metrics=SimpleNamespace(first_token_latency=0.5))]


def test_the_side_of_vllm_answers_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", library)  # type: ignore[arg-type]
    asked = [{"model": "target", "dtype": "float32"}]
    asked += [{"prompt": prompt, "sampling": {"temperature": 0, "max_tokens": 2}} for prompt in ([1], [1, 2])]
    version, *answers = vllm_side.answered(map(json.dumps, asked))
    assert version == {"version": "0.0"}
    assert answers == [
        {"tokens": [7, 7], "drafts": count, "forwards": 2 * count, "first_seconds": 0.5} for count in (1, 2)
    ]


VLLM = """
import json, sys
print("a line of vLLM's own", file=sys.stderr)
options = json.loads(input())
print(json.dumps({"version": "0.0"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["sampling"]["temperature"]:
        sys.exit(1)
    told = options.get("speculative_config") or {}
    tokens = [told.get("num_speculative_tokens", 0), *asked["sampling"]["stop_token_ids"]]
    print(json.dumps({"tokens": tokens, "drafts": 1, "forwards": 2, "first_seconds": 0.5}), flush=True)
"""


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """An interpreter that runs what stands for vLLM, whatever file it is given."""
    (tmp_path / "vllm.py").write_text(VLLM)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'vllm.py'}\n")
    python.chmod(0o755)
    return python


def test_vllm_decodes_plainly_with_its_lookup_and_with_our_head_in_processes_that_end(
    other_python: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            begun.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    model: Any = attach(tiny_target)
    model.generation_config.eos_token_id = [2]
    with vllm_peers(other_python, model, tiny_head) as (peers, version):
        assert version == "0.0"
        bench, drafted = Bench(model, 12, FakeClock(tick=1.0)), {}
        for peer in peers:
            run = bench.decode(PROMPT, peer)
            assert (run.timing.target_forwards, run.timing.prefill_seconds) == (2, 0.5)
            drafted[peer.name] = run.token_ids.tolist()
        with pytest.raises(OSError, match="its own lines above"):
            bench.decode(PROMPT, peers[0], temperature=1.0)
    assert drafted == {"vLLM (plain)": [0, 2], "vLLM (prompt lookup)": [10, 2], "vLLM (head)": [3, 2]}
    assert len(begun) == 3 and all(process.poll() is not None for process in begun)
