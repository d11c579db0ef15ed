"""A router that decides once for a layer and a sequence: full attention or sparse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.patterns.causal import Causal
from heedful.patterns.local_blocks import LocalBlocks
from heedful.patterns.pattern import Pattern
from heedful.patterns.sink import Sink
from heedful.registry import register


def streaming_blocks(block_size: int = 128, sink_blocks: int = 1, local_blocks: int = 16) -> Pattern:
    """The first blocks, the query's own and those before it up to `local_blocks` in all; nothing later."""
    for name, value in (("block_size", block_size), ("local_blocks", local_blocks)):
        check_positive(name, value)
    return Causal() & (Sink(sink_blocks * block_size) | LocalBlocks(block_size, local_blocks - 1))


def pool_ends(
    query: Float[Tensor, "b h n d"], pool: int, mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b d"]:
    """The mean over heads, the first `pool` tokens and the last `pool`; a token in both counts twice."""
    check_positive("pool", pool)
    return (query * end_weights(query, pool, mask)[:, None, :, None]).sum(2).mean(1)


def end_weights(
    query: Float[Tensor, "b h n d"], pool: int, mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b n"]:
    """The weight of each token in `pool_ends`; a row without tokens has none."""
    b, _, n, _ = query.shape
    real = torch.ones(b, n, dtype=torch.bool, device=query.device) if mask is None else mask
    count = real.cumsum(1)
    ends = (count <= pool).to(query.dtype) + (count[:, -1:] - count < pool).to(query.dtype)
    ends = ends * real
    return ends / ends.sum(1, keepdim=True).clamp(min=1)


@register(
    "layer-router", kind="routing", paper="flux-attention", tags=("layer", "router"), complexity="O(N C)"
)
class LayerRouter(nn.Module):
    """From a layer's queries to one decision: sparse (0) or full attention (1).

        f = W2 silu(W1 p + b1) + b2
        logits = W5 silu(W4 silu(W3 f + b3) + b4) + b5        index 0 sparse, index 1 full

    p is the mean of queries that `pool_ends` gives, before any rotary embedding. It begins with full
    attention: W5 = 0, b5 = (0, 4.5).

    head_dim     channels of a head
    temperature  of the Gumbel softmax in training; `router_temperature` gives the published schedule

    `decide` in training draws: z = onehot(argmax y) - stop(y) + y at index 1, y = softmax((logits + noise) /
    tau), so that its gradient is that of y. In eval mode z is the argmax.
    Source: Flux Attention, arXiv 2604.07394.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        temperature: float = 1.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("head_dim", head_dim)
        d = head_dim
        self.temperature = temperature
        self.features = nn.Sequential(
            nn.Linear(d, 8 * d, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(8 * d, 2 * d, device=device, dtype=dtype),
        )
        self.head = nn.Sequential(
            nn.Linear(2 * d, 4 * d, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(4 * d, d, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(d, 2, device=device, dtype=dtype),
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
                nn.init.zeros_(layer.bias)
        last = self.head[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            last.bias[1] = 4.5  # type: ignore[index, operator]

    def forward(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """The logits of sparse and full."""
        return self.head(self.features(pooled))

    def decide(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """0 (sparse) or 1 (full) for each row, differentiable in training."""
        logits = self(pooled)
        if not self.training:
            return logits.argmax(-1).to(pooled.dtype)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        noise = -(-(torch.rand_like(logits) + 1e-8).log() + 1e-8).log()
        full = ((logits + noise) / self.temperature).softmax(-1)[..., 1]
        hard = (full > 0.5).to(full.dtype)
        return (hard - full.detach() + full).to(pooled.dtype)


def router_temperature(step: int, steps: int, *, start: float = 1.5, end: float = 1.0) -> float:
    """The published schedule: from start to end along half a cosine over the first 60 % of the steps."""
    check_positive("steps", steps)
    share = min(1.0, step / (0.6 * steps))
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class SparsityTarget(nn.Module):
    """The pull of the share of sparse layers to a target for each task, with multipliers that learn.

        s = 1 - mean over layers of z,  loss = lambda1_k |s - t_k| + lambda2_k (s - t_k)^2

    The multipliers go up their gradient while all else goes down its own. Published targets: 0.45 for
    single-document and multi-hop question answering (tasks 0, 1), 1.0 for summaries, code and in-context
    learning (2, 3, 4).
    """

    def __init__(self, targets: Sequence[float] = (0.45, 0.45, 1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.register_buffer("targets", torch.tensor(targets))
        self.linear = nn.Parameter(0.5 * torch.rand(len(targets)))
        self.quadratic = nn.Parameter(0.5 * torch.rand(len(targets)))

    def forward(self, decisions: Sequence[Float[Tensor, "*b"]], task: int = 0) -> Float[Tensor, ""]:
        """decisions: z of each layer, or its batch mean, e.g. `aux_losses["full_share"]` of each mixer."""
        away = 1 - torch.stack(list(decisions)).mean(0) - self.targets[task]  # type: ignore[index]
        linear, quadratic = (_ascend(p[task]) for p in (self.linear, self.quadratic))
        return (linear * away.abs() + quadratic * away.square()).mean()


def _ascend(parameter: Tensor) -> Tensor:
    """The same value with the gradient reversed."""
    return 2 * parameter.detach() - parameter
