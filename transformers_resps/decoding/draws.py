"""The random numbers of coming positions, drawn as plain sampling would draw them, and given back where unused.

`torch.multinomial` draws one token of each row as a race: the largest p / e wins, where every token's e is drawn from
the exponential distribution of mean 1. These numbers do not depend on p. So they can be drawn for all levels of a tree
before anybody knows which node the text comes to, and the pick of every node follows: of each level one node is
reached, and its pick is the token that plain sampling draws there.

Source: ATen, `multinomial` in native/Distributions.cpp, its way of a single sample.
"""

from functools import cache

import torch
from torch import Tensor


class Draws:
    """Random numbers for as many positions as a tree has levels, the root's included.

    Args:
        count: positions.
        scores: `[n, v]` gives vocabulary, dtype and device.

    Attributes:
        numbers: `[count, v]`.
    """

    def __init__(self, count: int, scores: Tensor) -> None:
        self.numbers = scores.new_empty(count, scores.shape[-1])
        generator = _generator(scores.device)
        assert generator is not None
        self._generator, self._states = generator, [generator.get_state()]
        for position in self.numbers.split(1):
            position.exponential_()
            self._states.append(generator.get_state())

    def pick(self, scores: Tensor, levels: Tensor) -> Tensor:
        """`[n]` the tokens drawn from processed scores `[n, v]`, with the numbers of each row's level, `[n]`.

        -1 where nothing can be drawn from a row.
        """
        best = (scores.softmax(dim=-1) / self.numbers[levels]).max(dim=-1)
        return best.indices.masked_fill(best.values.isnan(), -1)

    def give_back(self, used: int) -> None:
        """Set the generator as if only the first `used` positions had drawn; not if another thread has drawn since."""
        if torch.equal(self._generator.get_state(), self._states[-1]):
            self._generator.set_state(self._states[used])


@cache
def draws_alike(device: torch.device, vocabulary: int) -> bool:
    """Whether `Draws` are those of `torch.multinomial` on a device: seen by doing, with the generator as it was."""
    generator = _generator(device)
    if generator is None:
        return False
    scores = torch.linspace(0, 1, vocabulary, device=device)[None]
    before, count = generator.get_state(), 8
    multinomial = [torch.multinomial(scores.softmax(dim=-1), 1) for _ in range(count)]
    after = generator.get_state()
    generator.set_state(before)
    draws = Draws(count, scores)
    picks = draws.pick(scores.expand(count, -1), torch.arange(count, device=device))
    is_alike = torch.equal(torch.cat(multinomial)[:, 0], picks) and torch.equal(generator.get_state(), after)
    generator.set_state(before)
    return is_alike


def _generator(device: torch.device) -> torch.Generator | None:
    """The generator of a device that plain sampling draws from; `None` where PyTorch does not show it."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators") and not hasattr(module, "get_rng_state"):
        return torch.default_generator  # a backend without random numbers of its own takes the CPU's
    generators: tuple[torch.Generator, ...] = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None
