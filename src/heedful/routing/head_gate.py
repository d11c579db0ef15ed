"""Which heads a token listens to, and how much: heads that all tokens share, and heads that it chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.registry import register


def wide_linear(
    x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*b o"]:
    """x W^T + b in float32 at least, also under autocast: rounding must not decide who is chosen."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def chosen(scores: Float[Tensor, "*b r"], k: int) -> Bool[Tensor, "*b r"]:
    """True at the k largest scores of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)


def token_lists(listed: Bool[Tensor, "b h n"]) -> tuple[Int[Tensor, "b h l"], Bool[Tensor, "b h l"]]:
    """The tokens of each head in their order, l = most tokens a head has; and which of them are its own.

    A shorter list begins with tokens that are not the head's, so that all lists end together.
    """
    longest = int(listed.sum(-1).max()) if listed.numel() else 0
    order = listed.to(torch.uint8).argsort(dim=-1, stable=True)
    order = order[..., listed.shape[-1] - longest :]
    return order, listed.gather(-1, order)


def load_balance(
    probability: Float[Tensor, "b n r"],
    taken: Bool[Tensor, "b n r"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """The loss that is least where all are used alike: R sum_r f_r P_r.

    f_r is the share of tokens that took r, P_r the mean of its probability, over the tokens that `mask`
    shows; at even use the loss is how many a token takes. Gradients pass through the probabilities.
    Source: Switch Transformers, arXiv 2101.03961; MoH, arXiv 2410.11842.
    """
    if mask is None:
        mask = taken.new_ones(taken.shape[:2])
    shown = mask[..., None].to(probability.dtype)
    tokens = shown.sum().clamp(min=1)
    used = (taken * shown).sum((0, 1)) / tokens
    mean = (probability * shown).sum((0, 1)) / tokens
    return probability.shape[-1] * (used * mean).sum()


def check_shares(heads: int, shared: int, routed: int) -> None:
    """Shared heads and those chosen of the rest fit the number of heads."""
    check_positive("heads", heads)
    if not 0 <= shared <= heads:
        raise ValueError(f"shared_heads is {shared}, must be from 0 to heads, which is {heads}")
    if not 0 <= routed <= heads - shared:
        raise ValueError(
            f"routed_heads is {routed}, must be from 0 to {heads - shared}, the heads that are not shared"
        )
    if routed == 0 and shared < heads:
        raise ValueError(
            f"routed_heads is 0, must be at least 1 with shared_heads below heads, {shared} of {heads}"
        )


def default_shares(heads: int, shared: int | None, routed: int | None) -> tuple[int, int]:
    """Half of the heads shared, half of the rest chosen, where nothing else is said."""
    shared = (heads + 1) // 2 if shared is None else shared
    routed = (heads - shared + 1) // 2 if routed is None else routed
    return shared, routed


@register("head-gate", kind="routing", paper="moh", tags=("heads", "router"), complexity="O(N C heads)")
class HeadGate(nn.Module):
    """One number a token and a head: S heads are shared, of the other R each token takes K.

        p = softmax(x W_route),  g_r = K p_r / (sum of p over the K largest) at those, 0 elsewhere
        g_s = S softmax(x W_share),  (w_1, w_2) = 2 softmax(x W_balance),  g = [w_1 g_s, w_2 g_r]

    At even weights every gate of a head that is on is 1. A softmax of a single number is 1 and has no
    parameters: no W_share at S = 1, no W_route at R = 1; without shared or without routed heads there is no
    W_balance. With K = 1 the one gate g_r is always K, so that W_route learns from the loss alone.

    dim     channels of x
    heads   S + R
    shared  S, the first heads
    routed  K, how many of the others are on

    Gives g (b, n, heads) and, where heads are routed, `load_balance` of p. Choices are made in float32.
    Raises ValueError if the numbers do not fit. Source: MoH, arXiv 2410.11842.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        shared: int,
        routed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_shares(heads, shared, routed)
        self.shared, self.routed, self.candidates = shared, routed, heads - shared
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.route = nn.Linear(dim, self.candidates, **factory) if self.candidates > 1 else None
        self.share = nn.Linear(dim, shared, **factory) if shared > 1 else None
        self.balance = nn.Linear(dim, 2, **factory) if shared and routed else None

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, ""] | None]:
        parts, loss = [], None
        # 1. Routed heads: the K largest probabilities, with the sum K.
        if self.routed:
            p = self._softmax(x, self.route)
            taken = chosen(p, self.routed)
            kept = p * taken
            total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps)
            parts.append(kept / total * self.routed)
            loss = load_balance(p, taken, mask)
        # 2. Shared heads, with the sum S.
        if self.shared:
            parts.insert(0, self._softmax(x, self.share) * self.shared)
        # 3. The two kinds against each other.
        if self.balance is not None:
            weight = self._softmax(x, self.balance) * 2
            parts = [part * w for part, w in zip(parts, weight.split(1, dim=-1), strict=True)]
        return torch.cat(parts, dim=-1).to(x.dtype), loss

    @staticmethod
    def _softmax(x: Tensor, linear: nn.Linear | None) -> Tensor:
        if linear is None:
            return x.new_ones(*x.shape[:2], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        return wide_linear(x, linear.weight).softmax(-1)
