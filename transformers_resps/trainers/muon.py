"""An optimiser that uses Muon for matrices and AdamW for other parameters, with one state dict and schedule.

`torch.optim.Muon` takes only matrices. On every device it multiplies matrices in bfloat16: `5 (4 m^2 n + 2 m^3)`
operations for a matrix `[m, n]`, m <= n. Here, on a CPU, its five steps are applied to eigenvalues in float32. That
takes about `4 m^2 n + 11 m^3` operations: half as many if m = n, a third if n = 3 m. To update a draft head's
matrices, `torch.optim.Muon` took 1.25 times as long on a CPU that multiplies bfloat16, and 6.5 times on others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Coefficients of the polynomial in Keller Jordan, "Muon" (2024).
_ITERATIONS = 5
_SMALLEST = 1e-7  # Lower limit of the norm by which a matrix is divided.
_MOMENTUM = 0.95  # Decay rate of Nesterov's momentum.
_TABLES = ("lm_head", "embed", "markov_w", "codebook")  # Name parts of matrices that have a row for each token.


def orthogonalise(matrix: Tensor) -> Tensor:
    """Move all singular values of a matrix `[m, n]` near 1 by five Newton-Schulz steps; keep its singular vectors.

    On a CPU the steps are applied to the eigenvalues of the smaller Gram matrix, in float32; on CUDA to matrices in
    bfloat16. If the input is not finite, neither is the result.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = wide / wide.norm().clamp(min=_SMALLEST)
    a, b, c = _COEFFICIENTS
    if _has_eigenvalues(matrix):
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        factors = torch.ones_like(squares)
        for _ in range(_ITERATIONS):
            step = a + b * squares + c * squares**2
            factors, squares = factors * step, squares * step**2
        wide = (vectors * factors) @ vectors.T @ wide
    else:
        for _ in range(_ITERATIONS):
            gram = wide @ wide.T
            step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            step.diagonal().add_(a)
            wide = step @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)


def _has_eigenvalues(matrix: Tensor) -> bool:
    """Return whether to apply the steps to eigenvalues: only for a finite matrix on a CPU (a GPU would be slower)."""
    return matrix.device.type == "cpu" and bool(matrix.norm().isfinite())


class Muon(Optimizer):
    """Updates parameter groups with `matrices=True` by Muon (orthogonalised momentum), other groups by AdamW.

    Muon's updates have a root mean square of 0.2, so that AdamW's learning rate fits; Muon ignores `betas` and `eps`.
    The weight decay is decoupled and applies to all parameters with at least two dimensions.

    Source: Jordan et al., Muon (2024); update scale 0.2 sqrt(max(m, n)) of Moonlight (arXiv 2502.16982) section 2.2.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # trainers pass no closure
        for group in self.param_groups:
            update = self._muon if group["matrices"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.ndim >= 2:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonalise(gradient.lerp(state["momentum"], _MOMENTUM))
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _adamw(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (first, second) = state["step"].item(), group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (state["square"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**step))


def muon_for(model: nn.Module, args: TrainingArguments) -> Muon:
    """Make a model's optimiser: Muon, but AdamW for vectors and for matrices that have a row for each token."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim == 2 and not any(table in name for table in _TABLES)].append(parameter)
    betas, kinds = (args.adam_beta1, args.adam_beta2), [(kind, found) for kind, found in groups.items() if found]
    settings = {"lr": args.learning_rate, "betas": betas, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}
    return Muon([{"params": found, "matrices": is_matrix} for is_matrix, found in kinds], settings)
