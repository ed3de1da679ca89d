"""A bundle: the files of a target beside `custom_generate/`, so that loading it makes `generate` fast."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from transformers import AutoConfig

from transformers_resps.hub.upload import CARD, GENERAL_TAGS, as_hub_id

from .artefact import Artefact, read_artefact
from .card import CUSTOM_TAGS
from .custom_code import custom_generate_files


_KINDS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a target; no code and no pickle
_IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")

_TEXT = """# {target}, with draft trees

The unchanged files of {target}, and code that decodes with the draft head and the policy of {name}. The output is the
target's own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(REPO_ID, trust_remote_code=True)  # this repository
inputs = AutoTokenizer.from_pretrained(REPO_ID)("The quick brown fox", return_tensors="pt")
model.generate(**inputs, max_new_tokens=256)
```

transformers-resps must be installed. `policy="plain"` decodes without drafts.
"""


def write_bundle(folder: Path, name: str, output: Path, target: str | None = None) -> list[str]:
    """Write a bundle into a new folder; returns the names of its files.

    Args:
        folder: of a head or a policy.
        name: under which it is published, or its path here.
        output: the new folder.
        target: folder or Hub id; by default what `folder` says.

    Raises:
        ValueError: `output` holds something already, or the target is not known, or not the head's.
        OSError: the target cannot be read.
    """
    artefact = read_artefact(folder)
    source = target or artefact.target
    if source is None:
        raise ValueError(f"No file of {folder} names the target. Pass `--target`.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Name a new folder.")
    _check_target(artefact, source)
    files = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=list(_KINDS)))
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(file for kind in _KINDS for file in files.glob(kind)):
        shutil.copyfile(file, output / file.name)
    for path, content in custom_generate_files(artefact, name).items():
        (output / path).parent.mkdir(exist_ok=True)
        (output / path).write_bytes(content)
    (output / CARD).write_text(_card(artefact, name, source), encoding="utf-8")
    return sorted(file.relative_to(output).as_posix() for file in output.rglob("*") if file.is_file())


def _check_target(artefact: Artefact, source: str) -> None:
    """Refuse a target of other sizes than the one that the head or the policy was trained for."""
    config = artefact.config.get("policy") or artefact.config
    trained, found = config.get("target") or {}, AutoConfig.from_pretrained(source).get_text_config()
    wrong = [key for key in _IDENTITY if key in trained and trained[key] != getattr(found, key, None)]
    if wrong:
        listed = ", ".join(f"{key} {getattr(found, key, None)!r} instead of {trained[key]!r}" for key in wrong)
        raise ValueError(f"{source} is not the target of {artefact.folder}: it has {listed}. Pass its own target.")


def _card(artefact: Artefact, name: str, source: str) -> str:
    target = artefact.target or source
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=as_hub_id(target),
        license=artefact.said.get("target_license"),
        tags=[*CUSTOM_TAGS, *GENERAL_TAGS],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_TEXT.format(target=target, name=name)}"))
