"""Group generalized mean pooling: a power mean over the tokens with one learned power a channel group."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_divides, check_mask, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "ggem",
    kind="pool",
    paper="ggem",
    tags=("pooling",),
    complexity="O(N C)",
)
class GGeMPool(Mixer):
    """Power mean over the tokens, one power for each group of consecutive channels.

        f[c] = (mean_n max(x[n, c], eps)^p[g])^(1 / p[g]),   g = c // (dim / groups)

    computed as exp((log sum_n exp(p log x) - log N) / p), in float32 or wider. p = 1 is average pooling
    of positive x; large p comes near max pooling; groups = 1 is GeM.

    dim        channels
    groups     number of powers, divides dim; the number of heads of the last block is the paper's choice
    power      initial value of every p, above 0
    eps        smallest activation
    negative   what becomes of negative activations (the paper does not say; all three are heedful's):
               "clamp" raises them to eps;
               "shift" subtracts m = min(0, min_n x[n, c]) before the mean and adds it again after;
               "signed" takes the mean s of sign(x) |x|^p and gives sign(s) |s|^(1 / p)
    learnable  whether the powers are trained

    `mask` (b, n) limits the mean to tokens where it is True; a row without such a token gives zeros.
    Raises ValueError if groups does not divide dim, power or eps is not above 0, or x has no tokens.
    Source: Group Generalized Mean Pooling for Vision Transformer, arXiv 2212.04114.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "groups": 4}

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 8,
        power: float = 3.0,
        eps: float = 1e-6,
        negative: Literal["clamp", "shift", "signed"] = "clamp",
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("groups", groups, "dim", dim)
        check_choice("negative", negative, ("clamp", "shift", "signed"))
        for name, value in (("power", power), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name} is {value!r}, must be above 0")
        self.groups = groups
        self.eps = eps
        self.negative = negative
        self.power = nn.Parameter(
            torch.full((groups,), float(power), device=device, dtype=dtype), requires_grad=learnable
        )

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, must have at least 1 token")
        wide = torch.promote_types(x.dtype, torch.float32)
        power = self.power.to(wide).repeat_interleave(self.dim // self.groups)
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        seen = seen[..., None]
        # A hidden token may hold anything, even NaN; as 0 it moves neither the shift nor the mean.
        a = x.to(wide).masked_fill(~seen, 0)
        shift = a.amin(1).clamp(max=0) if self.negative == "shift" else torch.zeros_like(a[:, 0])
        a = a - shift[:, None]
        size = a.abs() if self.negative == "signed" else a
        logits = power * size.clamp(min=self.eps).log()
        # Taking out the largest logit keeps exp in range; it cancels, so no gradient need pass it.
        top = logits.detach().masked_fill(~seen, -torch.inf).amax(1, keepdim=True).nan_to_num(neginf=0.0)
        terms = (logits - top).masked_fill(~seen, -torch.inf).exp()
        if self.negative == "signed":
            terms = terms * a.sign()
        mean = terms.sum(1) / seen.sum(1).clamp(min=1)
        tiny = torch.finfo(wide).tiny
        size = ((mean.abs().clamp(min=tiny).log() + top[:, 0]) / power).exp()
        # A mean of 0 has no root to take: a row without tokens, or signs that cancel.
        return (mean.sign() * size + shift).to(x.dtype)
