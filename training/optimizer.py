"""Optimizers: AdamW, and Muon for the matrices inside the blocks.

optimizer = Optimizer(model, train_config)
optimizer.set_lr(lr_scale(step, total, train_config))  # training/schedule.py
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from config import TrainConfig
from devices import native_bf16


def parameter_groups(model: nn.Module, train: TrainConfig) -> tuple[dict[str, nn.Parameter], ...]:
    """(Muon's, decayed, undecayed) parameters by name: disjoint, together all of them.

    Matrices are decayed, vectors (biases, LayerNorms) are not. Muon takes the matrices inside the blocks only.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in named.items() if train.optimizer == "muon" and p.dim() == 2 and n.startswith("h.")}
    decayed = {n: p for n, p in named.items() if n not in muon and p.dim() >= 2}
    plain = {n: p for n, p in named.items() if n not in muon and n not in decayed}
    return muon, decayed, plain


def orthogonalized(stack: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Matrices [n, A, B], each with its singular values brought near 1 (Newton-Schulz; Jordan et al. 2024, "Muon")."""
    a, b, c = coefficients
    tall = stack.size(1) > stack.size(2)
    x = stack.mT if tall else stack
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)  # [n, A, A]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` without torch's wrappers around two methods, which import its compiler for two seconds."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class StackedMuon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):  # type: ignore[misc]
    """`torch.optim.Muon` with matrices of one shape orthogonalized together, and in float32 where bf16 is slow.

    torch takes them one by one in bf16, which on a CPU without bf16 costs a small model more time than its own steps.
    """

    add_param_group = AdamW.add_param_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, alike in shapes.items():
                self._update(group, shape, alike)

    def _update(self, group: dict[str, Any], shape: torch.Size, alike: list[nn.Parameter]) -> None:
        gradients: list[Any] = [p.grad for p in alike]
        for parameter in alike:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in alike]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        kind = torch.bfloat16 if native_bf16(updates.device) else torch.float32
        straight = orthogonalized(updates.to(kind), group["ns_steps"], group["ns_coefficients"], group["eps"])
        weights: list[Any] = list(alike)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_add_(weights, straight.to(updates.dtype).unbind(), alpha=-rate)


class Optimizer:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest, with one interface.

    Muon: Jordan et al. 2024, as in `torch.optim.Muon`; its rate is `muon_lr` under the same schedule.
    """

    def __init__(self, model: nn.Module, train: TrainConfig):
        muon, decayed, plain = parameter_groups(model, train)
        self.names = {id(p): name for group in (muon, decayed, plain) for name, p in group.items()}
        groups = [
            {"params": list(decayed.values()), "weight_decay": train.weight_decay},
            {"params": list(plain.values()), "weight_decay": 0.0},
        ]
        device = next(model.parameters()).device.type
        sharded = type(next(model.parameters()).data).__name__ == "DTensor"
        adam = AdamW(
            groups,
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            fused=device in ("cuda", "cpu") and not sharded,
        )
        self.parts: list[torch.optim.Optimizer] = [adam]
        if muon:
            if not hasattr(torch.optim, "Muon"):
                raise ValueError("--train.optimizer muon needs torch 2.9 or newer: update torch or use adamw")
            kind = torch.optim.Muon if sharded else StackedMuon  # DTensors cannot be stacked
            self.parts.append(
                kind(list(muon.values()), lr=train.muon_lr, weight_decay=train.weight_decay, momentum=0.95)
            )
        self.peaks = [train.lr, train.muon_lr]

    def set_lr(self, scale: float) -> None:
        """Set every rate to `scale` times its peak."""
        for part, peak in zip(self.parts, self.peaks, strict=False):
            for group in part.param_groups:
                group["lr"] = peak * scale

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The moments by parameter name: {name: {"exp_avg": …, "exp_avg_sq": …, "step": …}}."""
        found: dict[str, dict[str, Tensor]] = {}
        for part in self.parts:
            for parameter, state in part.state.items():
                found[self.names[id(parameter)]] = {key: torch.as_tensor(value) for key, value in state.items()}
        return found

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` gave; a parameter that is missing raises ValueError.

        An empty state is accepted: an fp16 run stopped during its first overflows has taken no step yet.
        """
        for part in self.parts if state else ():
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = self.names[id(parameter)]
                    if name not in state:
                        raise ValueError(
                            f"the checkpoint has no optimizer state for {name}: resume with the optimizer it was trained with"
                        )
                    part.state[parameter] = {
                        key: value.to(parameter.device if value.dim() or part.defaults.get("fused") else "cpu").clone()
                        for key, value in state[name].items()
                    }
