"""Gaussian adaptive attention: features weighed by learned Gaussians of their own distribution."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.registry import register


def gaussian_weights(
    x: Float[Tensor, "..."],
    offsets: Float[Tensor, " k"],
    widths: Float[Tensor, " k"],
    *,
    axis: int = 1,
    shown: Bool[Tensor, "..."] | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "..."]:
    """Weights of x along an axis, a product of K Gaussian densities that sums to 1.

        z_i = (x - mean - offset_i) / sqrt(var + eps)
        w = prod_i exp(-z_i^2 / (2 c_i^2)) / sqrt(2 pi c_i^2),  w <- w / max(sum of w, eps)

    x        any shape; mean and unbiased variance are over `axis`, and so is the sum
    offsets, widths  of the K Gaussians; the sign of a width c has no effect
    shown    where x counts; elsewhere it is 0 in mean and variance, but not in z
    eps      keeps variance and sum from 0

    The variance of a single number is taken as 0. Source: arXiv 2401.11143.
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # products of densities underflow in half precision
    values = x.to(wide)
    counted = values if shown is None else values.masked_fill(~shown, 0.0)
    mean = counted.mean(axis, keepdim=True)
    square = (counted - mean).square().sum(axis, keepdim=True)
    deviation = (square / max(1, x.shape[axis] - 1) + eps).sqrt()
    log_weight = torch.zeros_like(values)
    for offset, width in zip(offsets.to(wide), widths.to(wide), strict=True):
        z = (values - mean - offset) / deviation
        log_weight = (
            log_weight - z.square() / (2 * width.square()) - 0.5 * (2 * math.pi * width.square()).log()
        )
    total = log_weight.logsumexp(axis, keepdim=True).clamp(min=math.log(eps))
    return (log_weight - total).exp().to(x.dtype)


@register(
    "gaam",
    kind="sequence",
    paper="gaam",
    tags=("heads", "linear", "reweighting"),
    aliases=("gaussian-adaptive-attention", "daam"),
    causal="optional",
    decode=True,
    complexity="O(N C)",
    exempt={
        "padded_equals_shorter": "masked tokens count as zeros in means, variances and lengths, "
        "as in the authors' code",
        "constructor_errors": "any number of heads fits: they cut the tokens, not dim",
    },
)
class GaussianAdaptiveAttention(Mixer):
    """Each head weighs its slice of x by Gaussians of x's own distribution along one axis.

        y = x * w,  w = `gaussian_weights` of each slice, with offsets and widths of its head

    The axis is cut into `heads` slices of equal length, the last of which takes the rest; weights sum to 1
    in every slice. There is no product of queries and keys: tokens mix through means, variances and sums.

    dim            channels
    heads          slices of the axis; slices of no element (fewer elements than heads) are left out
    gaussians      K, Gaussians a head; 2 K parameters a head are all there are
    causal         hide the future, which only norm_axis 2 can; ours, for decoders
    norm_axis      1: over tokens; 2: over the channels of each token, which sees no other token; None: 2 if
                   causal, else 1
    padding_value  numbers of x equal to it are padding; None: none are
    eps            keeps variances and sums from 0

    Padding (masked tokens, which are as padding of value 0, and what equals padding_value) counts as zeros in
    mean, variance and length, and leaves x as it is. `positions` have no effect. With norm_axis 2 the
    attribute `causal` is True and the state a count. Raises ValueError on wrong shapes, for another
    norm_axis, for a context, and with norm_axis 1 for causal=True or a state.
    Source: Gaussian Adaptive Attention is All You Need, arXiv 2401.11143.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2, "gaussians": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        gaussians: int = 5,
        causal: bool = False,
        norm_axis: int | None = None,
        padding_value: float | None = None,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("heads", heads)
        check_positive("gaussians", gaussians)
        if norm_axis is None:
            norm_axis = 2 if causal else 1
        check_choice("norm_axis", norm_axis, (1, 2))
        if causal and norm_axis == 1:
            raise ValueError("norm_axis is 1, must be 2 with causal=True: over tokens the future is seen")
        if norm_axis == 2 and heads > dim:
            raise ValueError(f"heads is {heads}, must be at most dim, {dim}, with norm_axis 2")
        self.causal = norm_axis == 2
        self.heads, self.norm_axis, self.padding_value, self.eps = heads, norm_axis, padding_value, eps
        self.offsets = nn.Parameter(torch.zeros(heads, gaussians, device=device, dtype=dtype))
        self.widths = nn.Parameter(torch.randn(heads, gaussians, device=device, dtype=dtype).exp())

    def init_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences: no token sees another, so it only counts."""
        if not self.causal:
            raise ValueError("norm_axis is 1, must be 2 to decode: later tokens would change earlier ones")
        return State()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], State]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None and not self.causal:
            raise ValueError(
                "state is given, must be None with norm_axis 1: later tokens change earlier ones"
            )
        shown = self._shown(x, mask)
        y = x * self.weights(x, mask=mask)
        y = y if shown is None else torch.where(shown, y, x)
        return y if state is None else (y, State(state.length + x.shape[1]))

    def weights(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """The weight of every number of x, padding among them."""
        shown = self._shown(x, mask)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        axis, size = self.norm_axis, x.shape[self.norm_axis] // self.heads
        parts = []
        for head in range(self.heads):
            start = head * size
            length = size if head < self.heads - 1 else x.shape[axis] - start
            if not length:
                continue
            parts.append(
                gaussian_weights(
                    x.narrow(axis, start, length),
                    self.offsets[head],
                    self.widths[head],
                    axis=axis,
                    shown=None if shown is None else shown.narrow(axis, start, length),
                    eps=self.eps,
                )
            )
        return torch.cat(parts, dim=axis) if parts else x

    def _shown(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which numbers of x are no padding; None: all."""
        shown = None if mask is None else mask[..., None].expand_as(x)
        if self.padding_value is None:
            return shown
        real = x != self.padding_value
        return real if shown is None else real & shown


class GaussianBlock(nn.Module):
    """Layers of Gaussian adaptive attention, each added to what it reads: x <- layer(x) + x.

    layers  one or more `GaussianAdaptiveAttention`, each with its own axis, heads and Gaussians.
    Source: Gaussian Adaptive Attention is All You Need, arXiv 2401.11143.
    """

    def __init__(self, *layers: GaussianAdaptiveAttention) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers is empty, must hold at least one GaussianAdaptiveAttention")
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        for layer in self.layers:
            x = layer(x, mask=mask) + x
        return x
