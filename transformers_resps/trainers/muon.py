"""Muon for the matrices, AdamW for everything else, in one optimiser: one state dict, one schedule.

`torch.optim.Muon` takes matrices only, and always iterates in bf16: on the matrices of a draft head it takes 1.25
times as long as this one on a CPU that multiplies bf16, 6.5 times on one that does not, and its updates differ by up
to 1%.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Keller Jordan, "Muon" (2024)
_ITERATIONS = 5
_SMALLEST = 1e-7  # norm that a matrix of zeros is divided by
_MOMENTUM = 0.95  # decay rate of Nesterov's momentum
_TABLES = ("lm_head", "embed", "markov_w", "codebook")


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix `[m, n]` with singular values near 1, by five steps of a Newton-Schulz iteration.

    On a CPU in fp32 by the eigenvalues of the smaller Gram matrix: the iteration itself takes twice as long. Elsewhere
    by the iteration, on CUDA in bf16. What is not finite stays so.
    """
    if _has_eigenvalues(matrix):
        return _through_eigenvalues(matrix.float()).to(matrix.dtype)
    wide: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = wide / wide.norm().clamp(min=_SMALLEST)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        wide = step @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)


def _has_eigenvalues(matrix: Tensor) -> bool:
    """Whether they can be computed here; on a GPU that takes longer than the iteration."""
    return matrix.device.type == "cpu" and bool(matrix.norm().isfinite())


def _through_eigenvalues(matrix: Tensor) -> Tensor:
    """Every step multiplies by a polynomial of the Gram matrix `[m, m]`, so eigenvalues tell what all of them do."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix / matrix.norm().clamp(min=_SMALLEST)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    factors = torch.ones_like(squares)
    for _ in range(_ITERATIONS):
        a, b, c = _COEFFICIENTS
        step = a + b * squares + c * squares**2
        factors, squares = factors * step, squares * step**2
    total: Tensor = (vectors * factors) @ vectors.T
    return total @ matrix if is_wide else matrix @ total


class Muon(Optimizer):
    """Orthogonalised momentum for groups with `matrices=True`, AdamW for the others.

    Muon's update has a root mean square of 0.2, so that one rate fits both kinds; `betas` and `eps` are AdamW's. The
    weight decay is decoupled, for all parameters of two and more dimensions.

    Source: Jordan et al., Muon (2024); update scale 0.2 sqrt(max(m, n)) of Moonlight (arXiv 2502.16982) section 2.2.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # trainers pass none
        for group in self.param_groups:
            update = self._muon if group["matrices"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, group)

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonalise(gradient.lerp(state["momentum"], _MOMENTUM))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (first, second) = state["step"].item(), group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (state["square"] / (1 - second**step)).sqrt_().add_(group["eps"])
        if parameter.ndim >= 2:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**step))


def muon_for(model: nn.Module, args: TrainingArguments) -> Muon:
    """Muon for a model's trained matrices; what has a row for each token, and vectors, go to AdamW."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and not any(table in name for table in _TABLES)
            groups[is_matrix].append(parameter)
    return Muon(
        [{"params": found, "matrices": is_matrix} for is_matrix, found in groups.items() if found],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        eps=args.adam_epsilon,
    )
