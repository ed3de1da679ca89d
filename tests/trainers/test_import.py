"""What checks and serves heads imports the trainers' maths: that must work without the extra `train`."""

import os
import subprocess
import sys
from pathlib import Path


CODE = """
import importlib.util, sys
absent, find = {"accelerate", "datasets", "peft", "rich", "trl"}, importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else find(name, package)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import transformers_resps.tools.cli, transformers_resps.trainers, transformers_resps.data
"""


def test_rooms_that_a_base_install_uses_import_nothing_of_the_extra() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
