"""A fingerprint by which a model's weights are recognised. Knows parameters: nothing of names, paths or files."""

import hashlib

from torch import nn


_SAMPLED = 64  # numbers of each parameter


def parameter_fingerprint(model: nn.Module) -> str:
    """A hash of a few numbers of every parameter: quick for any size, and different after any training.

    Of every parameter, because a fine-tune may leave some as they were: a merged LoRA the output head, for example.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        digest.update(name.encode() + numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
