"""Compile a model in another process, so that no call waits for a compiler.

The other process loads the checkpoint, compiles the functions that `generate` calls, and stores the code in the folder
from which all processes load compiled code. It may run longer than the process that started it.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .kernels import NO_COMPILER, compiler
from .packages import FOLDER_VARIABLE, packages_folder


logger = logging.getLogger(f"transformers.{__name__}")

# At 6 the process gets a fourth of a core beside two busy threads, and calls take 1.3 times as long; at 5, 1.4 times.
_NICENESS = 6
_RUN = f"import os; os.nice({_NICENESS}); from transformers_resps.tools.cli import main; raise SystemExit(main())"


def _with_settings(script: str) -> str:
    """Prepend this process's inductor settings to `script`: code depends on them, and torchao changes some of them."""
    changed = torch._inductor.config.codegen_config()
    return f"import torch._inductor.config\n{changed}\n{script}" if changed else script


class CompilerProcess:
    """Starts `resps compile` for one model in another process, unless a process of this user already compiles it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path()
        self._asked: set[tuple[str, ...]] = set()  # Arguments of processes that were started, or cannot start.
        self._waited_for: set[str] = set()  # Identities of models that another process already compiles.

    @property
    def is_running(self) -> bool:
        """Whether the process that `start` started still runs, which slows down calls of `generate`."""
        if self._process is not None and self._process.poll() is not None:
            self._see_end(self._process.returncode)
        return self._process is not None

    def start(self, identity: str, checkpoint: str, *arguments: str) -> None:
        """Start the process, unless it still runs, or was started or refused before with these `arguments`.

        `identity` is the model's `ModulePackages.identity`; `checkpoint` is its folder or Hub id, empty if the model
        was made in memory; `arguments` are heads and options for `resps compile`. If it cannot start, log a warning.
        """
        if self.is_running or arguments in self._asked:
            return
        folder = packages_folder()
        obstacles = {
            f"{FOLDER_VARIABLE} keeps no compiled code": folder is None,
            "processes cannot be started beside others on this system": os.name != "posix",
            "it was not loaded from a checkpoint": not checkpoint,
            NO_COMPILER: compiler() is None,
        }
        obstacle = next((obstacle for obstacle, stands in obstacles.items() if stands), None)
        try:
            if obstacle is None and folder is not None:
                self._start(folder, identity, ("compile", checkpoint, *arguments, "--only-as", identity))
        except OSError as fault:
            obstacle = f"{fault}. Set {FOLDER_VARIABLE} to another folder"
        if obstacle is not None:
            self._give_up(arguments, obstacle)
        elif self._process is not None:
            self._asked.add(arguments)

    def _start(self, folder: Path, identity: str, command: Sequence[str]) -> None:
        from fcntl import LOCK_EX, LOCK_NB, flock

        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = folder / f".{identity}.log"
        with (folder / f".{identity}.lock").open("wb") as lock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)  # held by the new process until it ends, however it ends
            except BlockingIOError:
                if identity not in self._waited_for:
                    self._waited_for.add(identity)
                    logger.warning("An earlier process compiles this model, and calls use its code when it is ready.")
                return
            modules = os.pathsep.join(path or os.getcwd() for path in sys.path)
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _with_settings(_RUN), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=[lock.fileno()],
                    process_group=0,  # Ctrl-C ends calls, not this process
                    env=os.environ | {"PYTHONPATH": modules, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
                )
        logger.warning(
            "Another process compiles this model, once, even if this one ends. Calls use its code when it is ready. "
            f"The code is kept in {folder}. `compile=False` switches this off."
        )

    def _see_end(self, status: int) -> None:
        self._process = None
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        if status:
            last = [line for line in lines if line.strip()][-1:] or [f"its process ended with status {status}"]
            self._give_up((), last[0].removeprefix("resps compile: "))
        else:
            logger.warning("This model is compiled, and calls use its code from now on.")

    def _give_up(self, arguments: tuple[str, ...], reason: str) -> None:
        self._asked.add(arguments)
        logger.warning(f"This model is not compiled beside calls: {reason.rstrip('.')}.")
