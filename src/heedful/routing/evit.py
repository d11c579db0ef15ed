"""Token reorganisation: the patches that the class token attends to stay, the others become one token."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.registry import register


@register(
    "evit",
    kind="routing",
    paper="evit",
    tags=("image", "token reduction"),
    aliases=("token-reorganizer",),
    complexity="O(N C)",
)
class TokenReorganizer(nn.Module):
    """Keeps the share of the patches with the largest attention of the class token, most attended first.

        keep = ceil(keep_rate patches),   extra = sum_j a_j x_j over the patches that are not kept
        x = [class token, kept, extra]

    a is the class token's attention to the patches in the mean over heads; it is not normalised over the
    others. There are no parameters; gradients pass through the weights, not through the choice.

    keep_rate  share of the patches kept, rounded up; at 1 all stay where they are. It may be set anew at
               any time, see `annealed_keep_rate`
    fuse       append the extra token; else the others are gone

    forward: x (b, 1 + n, c), class token first, and a (b, n). Gives the tokens and the numbers of the
    patches kept (b, keep), None where all stay. Raises ValueError if keep_rate is not in (0, 1].
    Source: EViT, arXiv 2202.07800.
    """

    def __init__(self, *, keep_rate: float = 0.7, fuse: bool = True) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is {keep_rate}, must be above 0 and at most 1")
        self.keep_rate, self.fuse = keep_rate, fuse

    def forward(
        self, x: Float[Tensor, "b n c"], class_attention: Float[Tensor, "b patches"]
    ) -> tuple[Float[Tensor, "b m c"], Int[Tensor, "b keep"] | None]:
        if class_attention.shape != (x.shape[0], x.shape[1] - 1):
            raise ValueError(
                f"class_attention has shape {tuple(class_attention.shape)}, must be "
                f"{(x.shape[0], x.shape[1] - 1)}, one weight for each token of x but the first"
            )
        first, patches = x[:, :1], x[:, 1:]
        keep = math.ceil(self.keep_rate * patches.shape[1])
        if keep == patches.shape[1]:
            return x, None
        index = class_attention.topk(keep).indices
        parts = [first, patches.gather(1, index[..., None].expand(-1, -1, x.shape[2]))]
        if self.fuse:
            others = class_attention.scatter(1, index, 0)
            parts.append(others[:, None].to(x.dtype) @ patches)
        return torch.cat(parts, dim=1), index

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, fuse={self.fuse}"


def annealed_keep_rate(step: int, *, target: float, start: int, total: int) -> float:
    """The rate at a step of training: 1 up to `start`, then a cosine over `total` steps down to `target`."""
    done = min(max(step - start, 0) / max(total, 1), 1.0)
    return target + (1 - target) * 0.5 * (math.cos(math.pi * done) + 1)


def follow_places(
    place: Int[Tensor, "b places"], index: Int[Tensor, "b keep"], patches: int, *, fused: bool
) -> Int[Tensor, "b places"]:
    """Which patch stands for each place of the image after a choice of `index` from `patches` patches.

    place: the same before; -1 for a place that nothing stands for. A place whose patch was not kept goes
    to the extra token where there is one.
    """
    keep = index.shape[1]
    new = index.new_full((index.shape[0], patches + 1), -1)
    new[:, :patches] = keep if fused else -1
    new.scatter_(1, index, torch.arange(keep, device=index.device).expand_as(index))
    return new.gather(1, torch.where(place < 0, patches, place))
