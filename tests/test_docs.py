"""Every block of README and docs runs, with a tiny target and head in the place of the real ones."""

import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from shutil import copytree

import generate_dataset
import pytest
import torch
from safetensors.torch import load_file, save_file

import transformers_resps
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, trainers
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.tools import cli

from .assistants.mtp_cases import CASES
from .hub import rehearse
from .image_processors import image_processor, image_target, parts, picture
from .targets import Architecture
from .test_prose import unplain
from .tokenizers import ON_ONE_LINE, templated, turns


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "training" / "PUBLISHING.md", ROOT / "training" / "benchmarking" / "RESULTS.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Shortens what a command of the docs would do for hours. What it is told in the docs must still be understood.
QUICKLY = {
    "resps doctor": "--answers 3 --max-new-tokens 6",
    "resps bench": "--limit 1 --max-new-tokens 6 --repeats 1 --dtype float32 --accept-noise",
    "resps calibrate": "--dtype float32",
    "resps verify": "--dtype float32 --seeds 2 --max-new-tokens 6",
    "resps serve": "--port 0 --dtype float32",
    "resps inspect": "--dtype float32 --max-new-tokens 6",
    "benchmark.py": "--limit 1 --max-new-tokens 6 --repeats 1 --dtype float32 --accept-noise",
    "generate_dataset.py": "--max-new-tokens 6 --limit 4 --compile never",
    "train_head.py": "--max_steps 2 --ttt_steps 2 --tokens_per_batch 64 --draft_vocab_size 12 --eval_conversations 1 "
    "--eval_strategy no --save_steps 2 --bf16 False --feature_cache_dir features --warmup_steps 0 "
    "--lr_scheduler_type linear --lr_scheduler_kwargs {}",
    "train_policy.py": "--max_steps 8 --max_completion_length 12 --limit 6 --eval_steps 8 --save_steps 8 "
    "--target_dtype float32 --drop_hopeless False",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' paths and names exist, all tiny; copy it before you change it."""
    folder = tmp_path_factory.mktemp("desk")
    target = Architecture("llama", {"max_position_embeddings": 1024}).build("sdpa").float()
    target.save_pretrained(folder / "target")
    torch.manual_seed(1)
    DraftHead.from_target(target, draft_vocab_size=12).save_pretrained(folder / "head-run" / "head")
    DraftHead.from_target(target, draft_vocab_size=12).save_pretrained(folder / "given")
    FixedPolicy(TreeShape(4, 2, 2)).save_pretrained(folder / "policy-run" / "policy")
    tokenizer = templated(ON_ONE_LINE)
    tokenizer.save_pretrained(folder / "target")
    words = ("fghi", "gh", "hifgh", "ifgf", "jklm", "nopqr", "defg", "mnbd")
    rows = [{"prompt_id": word, "prompt": word, "completion": 3 * word} for word in words]
    for name in ("prompts.jsonl", "other.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    roles = (("user", "prompt"), ("assistant", "completion"))
    answers = [
        {"prompt_id": row["prompt"], "messages": [{"role": role, "content": row[said]} for role, said in roles]}
        for row in rows
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    save_with_mtp(folder / "with-mtp")
    tokenizer.save_pretrained(folder / "with-mtp")
    image_target().save_pretrained(folder / "seeing")
    image_processor().save_pretrained(folder / "seeing")
    picture().save(folder / "photo.jpg")
    photos = [{"images": ["photo.jpg"], "prompt": parts(turns(word), images=1)} for word in words]
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, photos)))
    copytree(ROOT / "model_cards" / "smollm2-135m-instruct-head", folder / "artefact")
    (folder / "training").symlink_to(ROOT / "training")
    return folder


@pytest.fixture
def desk(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pristine folder; the working directory of the test."""
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path / "cache"))
    copytree(pristine, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    return tmp_path


def save_with_mtp(folder: Path) -> None:
    """A tiny Qwen3.5 as it is published: Transformers drops its MTP layer on load."""
    case = next(case for case in CASES if case.name == "Qwen3.5")
    case.build().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    save_file(load_file(weights) | case.raw(), weights, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | case.stated))


def tiny(text: str) -> str:
    """The names of the docs, as they are called on the desk."""
    text = re.sub(r"HuggingFaceTB/SmolLM2-(135M|1.7B)-Instruct|Qwen/Qwen3-8B|\bTARGET\b", "target", text)
    text = text.replace("Qwen/Qwen3.5-4B", "with-mtp")
    text = re.sub(r"\bFOLDER\b", "artefact", text)
    text = text.replace("google/gemma-3-4b-it", "seeing")
    text = re.sub(r"max_steps=\d+", "max_steps=4", text)
    text = text.replace("--hours 4", "--hours 0.003")
    text = text.replace('"policy-run", ', '"policy-run", drop_hopeless=False, ')  # a clock may say that none pays
    text = re.sub(r"draft_vocab_size=\d+", "draft_vocab_size=12", text)
    text = re.sub(r'(?<=")cuda(?=")|(?<=--device )mps', "cpu", text)
    head = r"model_cards/smollm2-135m-instruct-head|RedHatAI/Qwen3-8B-speculator\.eagle3|\bHEAD\b"
    return re.sub(head, "given", text)


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    unknown = {language for language, _ in found} - {"python", "bash", "bibtex", "text"}
    assert not unknown, f"{page.name} has blocks in {unknown}, which nothing runs"
    return [text for language, text in found if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "torchao" in page.read_text(encoding="utf-8"):  # its configs change settings for all tests that follow
        monkeypatch.setattr("torchao.quantization.utils.recommended_inductor_config_setter", lambda: None)
    namespace: dict[str, object] = {}  # a page defines every name that it uses
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(tiny(block), f"{page.name}, block {number}", "exec"), namespace)


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def _wait_for_no_requests(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server ends when it has loaded its models."""
    if words[:2] == ["resps", "serve"]:
        uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
        monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_works(line: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_function.torch, "compile", lambda function, **_: function)  # saves half a minute
    monkeypatch.setattr(generate_dataset, "attach", lambda target, **_: attach(target))  # and so does this
    words = shlex.split(tiny(line), comments=True)
    _wait_for_no_requests(words, monkeypatch)
    quickly = next((shlex.split(more) for name, more in QUICKLY.items() if name in " ".join(words[:2])), [])
    match words:
        case ["resps", *arguments]:
            assert cli.main([*arguments, *quickly]) in (0, 1)  # 1: looked, and did not like the random head
        case ["python", "-m", "tests.hub.rehearse", *command]:
            assert rehearse.main(command) in (0, 1)  # 1: of other weights than its results
        case ["python", script, "--help"]:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        case ["python", "training/benchmark.py" as script, *arguments]:
            monkeypatch.setattr(sys, "argv", [script, *arguments, *quickly])
            with pytest.raises(SystemExit, match="[01]"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        case ["python", "training/publish.py" as script, *arguments]:  # offline: it looks, and says what is missing
            dry = [] if "--render" in arguments else ["--dry-run"]
            monkeypatch.setattr(sys, "argv", [script, *arguments, *dry])
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as ended:
                assert ended.code in (0, 1)
        case ["python", script, *arguments]:
            monkeypatch.setattr(sys, "argv", [script, *arguments, *quickly])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        case ["make", goal, *_]:
            assert re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", *options, wanted]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            name, _, extras = wanted.strip("]").partition("[")
            assert options in ([], ["-e"]) and name in (".", project["name"])
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
        case _:
            pytest.fail(f"nothing checks the command `{line}`; add a case")


LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
LINKED += [*sorted((ROOT / "training").rglob("*.md")), *sorted((ROOT / "model_cards").glob("*/README.md"))]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}, which is no file: the site would lack it"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which is no heading there"


def test_the_site_has_every_page_and_no_other() -> None:
    site = runpy.run_path(str(ROOT / "docs" / "make_site.py"))
    shown: set[Path] = site["pages"]()
    pages = {page.relative_to(ROOT) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
    assert pages | {page for page in shown if page.parts[0] == "training"} == shown
    assert all((ROOT / page).is_file() for page in shown)
    outside = {file for page in shown for file in site["linked"](page) if file.suffix == ".md"}
    assert not outside, "Sphinx warns of pages that the navigation lacks, and then there is no site"


def test_the_api_reference_shows_every_public_name_in_plain_words() -> None:
    rendered: str = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["render"]()
    shown = set(re.findall(r"^## `(\w+)`$", rendered, re.MULTILINE))
    assert shown >= {*transformers_resps.__all__, *trainers.__all__}
    assert not unplain(rendered)
