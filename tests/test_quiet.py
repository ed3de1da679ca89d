"""Quiet by default: what goes to a log goes under Transformers' verbosity, and nothing is printed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.trainers.head_trainer import warn_if_small


PACKAGE = Path(__file__).parents[1] / "transformers_resps"
OURS = "transformers.transformers_resps"


def test_every_logger_hangs_below_transformers_own() -> None:
    loggers = [
        line
        for file in PACKAGE.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if "getLogger(" in line or "get_logger(" in line
    ]
    others = {  # whose messages are filtered
        '    server_log = logging.getLogger("transformers.cli.serving")',
        '    compiler = logging.getLogger("torch._inductor.ir")',
    }
    assert set(loggers) == {'logger = logging.getLogger(f"transformers.{__name__}")', *others}


def test_the_library_sets_no_level_and_no_handler() -> None:
    names = [name for name in logging.root.manager.loggerDict if name.startswith(OURS)]
    assert names
    for name in names:
        logger = logging.getLogger(name)
        assert logger.level == logging.NOTSET and logger.handlers == [] and logger.propagate


def test_transformers_verbosity_rules_our_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()
        warn_if_small(1000)
        assert not logging.getLogger(f"{OURS}.trainers.head_trainer").isEnabledFor(logging.WARNING)
        assert capfd.readouterr().err == ""
        transformers.logging.set_verbosity_info()
        assert logging.getLogger(f"{OURS}.trainers.head_trainer").isEnabledFor(logging.INFO)
    finally:
        transformers.logging.set_verbosity(before)


def test_a_warning_is_written_once_by_transformers_handler() -> None:
    code = "from transformers_resps.trainers.head_trainer import warn_if_small; warn_if_small(1000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "1,000 positions" in line]
    assert line.startswith("[transformers] ")


def test_decoding_says_nothing(
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    prompt: dict[str, torch.Tensor],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for policy in (FixedPolicy(TreeShape(6, 3, 2, 4)), "auto"):
        attach(tiny_target).generate(
            **prompt, assistant_model=tiny_head, policy=policy, max_new_tokens=12, do_sample=False
        )
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
