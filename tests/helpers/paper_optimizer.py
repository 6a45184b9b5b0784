"""The paper's optimizer in plain PyTorch, written independently of DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Orthogonalise a matrix by the quintic Newton-Schulz iteration, in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class PaperOptimizer:
    """The paper's Muon and AdamW on full fp32 parameters."""

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        muon_names: Iterable[str],
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        newton_schulz_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters, self.muon_names = parameters, set(muon_names)
        self.weight_decay, self.momentum, self.betas, self.eps = weight_decay, momentum, betas, eps
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.newton_schulz_dtype = newton_schulz_dtype
        self.updates = 0

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor], lr: float) -> None:
        self.updates += 1
        for name, parameter in self.parameters.items():
            gradient = gradients[name]
            parameter.mul_(1 - lr * self.weight_decay)
            if name in self.muon_names:
                buffer = self.first[name]
                buffer.mul_(self.momentum).add_(gradient)
                # Any factor will do but for the rounding to bf16: this one is DeepSpeed's.
                nesterov = (gradient + self.momentum * buffer) * (1 - self.momentum)
                direction = newton_schulz(nesterov.to(self.newton_schulz_dtype)).float()
                parameter.sub_(lr * 0.2 * math.sqrt(max(parameter.shape)) * direction)
                continue
            beta1, beta2 = self.betas
            self.first[name].lerp_(gradient, 1 - beta1)
            self.second[name].lerp_(gradient**2, 1 - beta2)
            mean = self.first[name] / (1 - beta1**self.updates)
            scale = (self.second[name] / (1 - beta2**self.updates)).sqrt() + self.eps
            parameter.sub_(lr * mean / scale)
