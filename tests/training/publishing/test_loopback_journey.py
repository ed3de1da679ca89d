"""The same over the environment that a user has: `HF_ENDPOINT`, in a process of its own, with nothing patched."""

import os
import subprocess
import sys

from tests.hub.loopback_hub import TOKEN, LoopbackHub


JOURNEY = """
import torch
from tests.training.publishing.tiny import tiny_target
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, TreeShape, attach

target = tiny_target()
head = DraftHead.from_target(target, draft_vocab_size=48)
head.push_to_hub("head")
FixedPolicy(TreeShape(4, 2, 2)).push_to_hub("policy")
loaded = DraftHead.from_pretrained("tester/head", target=target)
policy = AutoPolicy.from_pretrained("tester/policy")
prompt = torch.tensor([[1, 17, 23, 5]])
settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
plain = target.generate(prompt, **settings)
assert torch.equal(attach(target).generate(prompt, assistant_model=loaded, policy=policy, **settings), plain)
"""


def test_push_pull_and_generate_through_hf_endpoint(tmp_path):
    hub = LoopbackHub()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", JOURNEY], env=environment, capture_output=True, text=True, check=False
    )
    hub.close()
    assert done.returncode == 0, done.stderr
    assert set(hub.repositories) == {"tester/head", "tester/policy"}
