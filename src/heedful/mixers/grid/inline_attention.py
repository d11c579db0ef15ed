"""InLine attention: linear attention made injective by subtraction, with a local residual of v."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_divides, check_map, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.ops.linear import linear_attention
from heedful.registry import register

_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,  # slope 0.01
    "exp": lambda x: (0.2 * x).exp(),
}


@register(
    "inline-attention",
    kind="grid",
    paper="inline-attention",
    tags=("linear",),
    aliases=("injective-linear-attention",),
    spatial=(2,),
    complexity="O(N C^2 / heads)",
)
class InLineAttention(Mixer):
    """Linear attention normalised by subtraction, plus a 3 x 3 convolution of v made from the mean token.

        r = MLP(mean_i(x_i)), one 3 x 3 kernel a channel
        y = W_o (inline_attention(phi(q), phi(k), v) + DWConv_r(v))

    dim       channels
    heads     divides dim; also the groups of the two layers of the MLP
    features  phi: "identity", "relu", "leakyrelu" (slope 0.01) or "exp", which is exp(0.2 x)
    qkv_bias  whether the projection of queries, keys and values has a bias
    dropout   of the output

    Raises ValueError if heads does not divide dim or features is unknown.
    Source: InLine, arXiv 2412.06590.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        features: str = "identity",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_choice("features", features, tuple(_FEATURES))
        self.heads = heads
        self.features = features
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.residual = _kernel_mlp(dim, heads, device, dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        y = self._mix(x.flatten(2).transpose(1, 2), size)
        return y.transpose(1, 2).unflatten(2, size)

    def _mix(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """The mechanism on tokens; those ahead of the map (a class token) are not convolved."""
        ahead = x.shape[1] - size[0] * size[1]
        phi = _FEATURES[self.features]
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # 1
        y = _attend(phi(q), phi(k), v, heads=self.heads)  # 2
        kernels = self.residual(x.mean(1)[..., None])  # 3
        local = _convolve(v[:, ahead:].transpose(1, 2).unflatten(2, size), kernels)
        y = self.proj(y + F.pad(local.flatten(2).transpose(1, 2), (0, 0, ahead, 0)))  # 4
        return F.dropout(y, self.dropout, self.training)


class InLineAttentionDeiT(InLineAttention):
    """InLine attention over a class token and the map behind it, as in InLine-DeiT.

    The class token is one of the tokens of all sums and means; it gets nothing of the convolution. Takes
    tokens (b, 1 + height * width, c), class token first.

    Arguments and errors as in `InLineAttention`. Source: InLine, arXiv 2412.06590.
    """

    def forward(
        self, x: Float[Tensor, "b n c"], *, size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        """`size` is the (height, width) of the map behind the class token, default a square."""
        check_tokens("x", x, self.dim)
        height, width = (math.isqrt(max(0, x.shape[1] - 1)),) * 2 if size is None else size
        if height < 1 or width < 1 or x.shape[1] != 1 + height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, must have {1 + height * width}: "
                f"a class token and a map of {height} x {width}"
            )
        return self._mix(x, (height, width))


class InLineAttentionCSwin(nn.Module):
    """A branch of InLine-CSwin: InLine attention of projected tokens, with two convolutions of v.

        r = MLP(mean),   y = inline_attention(q, k, v) + DWConv3x3(v) + DWConv_r(v)

    The projections belong to the block, which gives each branch its share of the channels. The window of a
    branch is the whole map, as in the released models.

    dim    channels of the branch
    heads  divides dim; also the groups of the two layers of the MLP

    forward: q, k, v (b, dim, height, width) and mean (b, dim), the mean of the block's input before its
    normalisation. Raises ValueError on wrong shapes. Source: InLine, arXiv 2412.06590.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.dim = dim
        self.heads = heads
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.residual = _kernel_mlp(dim, heads, device, dtype)

    def forward(
        self,
        q: Float[Tensor, "b c height width"],
        k: Float[Tensor, "b c height width"],
        v: Float[Tensor, "b c height width"],
        mean: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b c height width"]:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_map(name, x, self.dim, (2,))
        if mean.shape != q.shape[:2]:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, must be {tuple(q.shape[:2])}")
        tokens = [t.flatten(2).transpose(1, 2) for t in (q, k, v)]
        y = _attend(*tokens, heads=self.heads).transpose(1, 2).unflatten(2, q.shape[2:])
        return y + self.lepe(v) + _convolve(v, self.residual(mean[..., None]))


def inline_attention(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h m d"], value: Float[Tensor, "b h m e"]
) -> Float[Tensor, "b h n e"]:
    """Linear attention whose weights sum to 1 by subtraction; they can be negative.

        s_ij = q_i . k_j / (m sqrt(d)),   y_i = sum_j (s_ij - sum_l s_il / m + 1 / m) v_j

    Queries that differ have different weights, where the centred keys span all d directions; division
    cannot tell q from 2 q. Queries and keys can have any sign.

    The result has the dtype of query. Source: InLine, arXiv 2412.06590.
    """
    # What is subtracted centres the values: y_i = mean(v) + sum_j s_ij (v_j - mean(v)).
    root = (query.shape[-1] ** 0.5 * key.shape[2]) ** -0.5  # on both sides, for the range of half precision
    mean = value.mean(2, keepdim=True)
    return linear_attention(query, key * root, (value - mean) * root, causal=False) + mean  # type: ignore[operator]


def _attend(
    q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], v: Float[Tensor, "b n c"], *, heads: int
) -> Float[Tensor, "b n c"]:
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(inline_attention(q, k, v), "b h n d -> b n (h d)")


def _kernel_mlp(
    dim: int, heads: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    """From the mean token (b, c, 1) to a 3 x 3 kernel a channel, (b, 9 c, 1), channel by channel."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=heads, device=device, dtype=dtype),
        nn.GELU(),
        nn.Conv1d(dim, 9 * dim, 1, groups=heads, device=device, dtype=dtype),
    )


def _convolve(
    image: Float[Tensor, "b c height width"], kernels: Float[Tensor, "b taps 1"]
) -> Float[Tensor, "b c height width"]:
    """Each channel of each image with its own 3 x 3 kernel, zeros around."""
    b, c = image.shape[:2]
    if b == 0:  # a convolution needs one group at least
        return image
    image = image.reshape(1, b * c, *image.shape[2:])
    return F.conv2d(image, kernels.reshape(b * c, 1, 3, 3), padding=1, groups=b * c).unflatten(1, (b, c))[0]
