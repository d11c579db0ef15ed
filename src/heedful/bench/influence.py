"""What influences what in a trained mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.bench.choices import Choice
from heedful.bench.hosts import OnGrid
from heedful.bench.tasks import Images, Task
from heedful.patterns import Pattern

MOST = 96  # tokens of a sequence that are looked at
PROBES = 4


@dataclass(frozen=True)
class Influence:
    """Jacobian norms of the last mixer on a held-out input, and its pattern where it has one.

    jacobian[i, j] estimates |d out_i / d x_j|; i and j are tokens, or channels for a channel mixer; for a
    pool mixer i is a channel of its one vector.
    """

    rows: str  # what i counts
    columns: str
    jacobian: Tensor
    mask: Tensor | None  # who may see whom
    pattern: str
    side: int | None  # of the grid on which tokens lie


def influence(choice: Choice, model: nn.Module, task: Task, device: torch.device) -> Influence:
    """Look at the last place in a trained network where the mixer stands."""
    cls = choice.entry.load()
    mixer = [module for module in model.modules() if isinstance(module, cls)][-1]
    slot = next((m for m in model.modules() if isinstance(m, OnGrid) and m.mixer is mixer), mixer)
    x = _input_of(slot, model, task, device)
    side = task.side if isinstance(task, Images) else None
    pattern = getattr(mixer, "pattern", None)
    if slot is not mixer and callable(pattern):  # mixers of maps make it for the size
        pattern = pattern((x.shape[1],) if side is None else (side, side))
    mask = pattern.mask(x.shape[1])[0, 0] if isinstance(pattern, Pattern) else None
    kind = choice.entry.kind
    jacobian = _over_channels(slot, x) if kind == "channel" else _over_tokens(slot, x)
    rows, columns = {"channel": ("channel", "channel"), "pool": ("channel", "token")}.get(
        kind, ("token", "token")
    )
    return Influence(rows, columns, jacobian.cpu(), mask, "" if mask is None else str(pattern), side)


def _input_of(slot: nn.Module, model: nn.Module, task: Task, device: torch.device) -> Tensor:
    """What the mixer is given for the first held-out input."""
    seen: list[Tensor] = []
    handle = slot.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()
    try:
        with torch.no_grad():
            model(next(iter(task.held_out()))[0][:1].to(device))
    finally:
        handle.remove()
    x = seen[-1].detach()
    return x if isinstance(task, Images) else x[:, :MOST]


def _over_tokens(slot: nn.Module, x: Float[Tensor, "1 n c"]) -> Float[Tensor, "i n"]:
    """|d out_i / d x_j| over tokens, from random projections: E |v' J|^2 = |J|_F^2 for v of unit variance.

    One batch row serves one (probe, i): rows are independent, so a single backward gives all of them.
    A vector out (pool mixers) has its channels as i.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    with torch.no_grad():
        shape = slot(x).shape
    probes = PROBES if len(shape) == 3 else 1  # one number needs no random direction
    i = torch.arange(shape[1], device=x.device)
    total = torch.zeros(shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(probes):
        wide = x.repeat(shape[1], 1, 1).requires_grad_()
        chosen = slot(wide)[i, i]  # (i, c), or (i,) of a pool mixer
        probe = torch.randn(chosen.shape, generator=generator, dtype=x.dtype, device=x.device)
        direction = probe if len(shape) == 3 else torch.ones_like(chosen)
        (gradient,) = torch.autograd.grad(chosen, wide, direction)
        total += gradient.square().sum(-1)
    return total.div(probes).sqrt()


def _over_channels(slot: nn.Module, x: Float[Tensor, "1 n c"]) -> Float[Tensor, "c c"]:
    """|d (sum over space of out_c) / d x_c'| over channels."""
    count = x.shape[2]
    wide = x.repeat(count, 1, 1).requires_grad_()
    i = torch.arange(count, device=x.device)
    (gradient,) = torch.autograd.grad(slot(wide)[i, :, i].sum(), wide)
    return gradient.square().sum(1).sqrt()
