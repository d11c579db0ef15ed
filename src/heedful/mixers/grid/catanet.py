"""CATANet's two mixers: tokens grouped by content wherever they are, and overlapping patches."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.centres import chunk_centres, nearest_centre, next_centres, reflected


class _Projections(nn.Module):
    """Queries and keys of qk_dim channels, values of dim, and the way back; no biases."""

    def __init__(self, dim: int, heads: int, qk_dim: int, **where: Any) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        check_divides("heads", heads, "qk_dim", qk_dim)
        self.heads = heads
        self.query = nn.Linear(dim, qk_dim, bias=False, **where)
        self.key = nn.Linear(dim, qk_dim, bias=False, **where)
        self.value = nn.Linear(dim, dim, bias=False, **where)
        self.proj = nn.Linear(dim, dim, bias=False, **where)

    def split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class _ConvFFN(nn.Module):
    """fc2(z + GELU(DWConv5x5(z))), z = GELU(fc1(x)), on tokens that form a map."""

    def __init__(self, dim: int, hidden: int, **where: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **where)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, **where)
        self.fc2 = nn.Linear(hidden, dim, **where)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        z = self.act(self.fc1(x))
        near = self.act(self.dwconv(z.mT.unflatten(2, size)))
        return self.fc2(z + near.flatten(2).mT)


@register(
    "token-aggregation-block",
    kind="grid",
    paper="catanet",
    tags=("cluster", "sparse", "restoration"),
    aliases=("tab", "content-aware-token-aggregation"),
    spatial=(2,),
    complexity="O(N (2 group_size + centres) C)",
    exempt={
        "batch_rows": "before the first training step the centres are means over the batch, as published",
        "activation_checkpointing": "the centres move with every forward in training, as published",
    },
)
class TokenAggregationBlock(Mixer):
    """Tokens of like content attend to one another, wherever they are, and to the centres they gather round.

        t = LN(x);   g: centres, shared by all images;   tokens sorted by argmax_j cos(t_i, g_j)
        y_i = softmax(q_i k_W^T / sqrt(d)) v_W + softmax(q_i k_g^T / sqrt(d)) v_g
        x = x + W_1 W_o y;   x = x + ffn(LN(x))

    The sorted tokens are cut into groups of group_size; W are the tokens of the own group and the next one.
    The end is filled up by the last tokens, turned round. In training the centres are stepped towards the
    tokens first, the last step with gradient, and the buffer follows slowly; in eval it is used as it is.

    dim         channels
    heads       a divisor of dim and of qk_dim
    qk_dim      width of queries and keys
    mlp_dim     hidden width of the feed-forward net
    centres     how many
    group_size  tokens of a group
    iterations  steps of the centres in training
    decay       share of a centre that stays in a training step

    Source: CATANet, arXiv 2503.06896.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 2,
        "qk_dim": 8,
        "mlp_dim": 24,
        "centres": 4,
        "group_size": 8,
    }
    centres: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        centres: int = 64,
        group_size: int = 64,
        iterations: int = 5,
        decay: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        for name, value in (("centres", centres), ("group_size", group_size), ("iterations", iterations)):
            check_positive(name, value)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay!r}, must be between 0 and 1")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group_size, self.iterations, self.decay = group_size, iterations, decay
        self.norm = nn.LayerNorm(dim, **where)
        self.attention = _Projections(dim, heads, qk_dim, **where)
        self.centre_key = nn.Linear(dim, qk_dim, bias=False, **where)
        self.centre_value = nn.Linear(dim, dim, bias=False, **where)
        self.mix = nn.Linear(dim, dim, bias=False, **where)
        self.ffn_norm = nn.LayerNorm(dim, **where)
        self.ffn = _ConvFFN(dim, mlp_dim, **where)
        self.register_buffer("centres", torch.randn(centres, dim, **where))
        self.register_buffer("started", torch.tensor(False, device=device))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).mT
        t = self.norm(tokens)
        unit = F.normalize(t, dim=-1)
        centres = self.current_centres(t, unit)
        order = nearest_centre(unit, F.normalize(centres, dim=-1)).argsort(dim=-1, stable=True)
        y = self.attend(t, order, centres)
        tokens = tokens + self.mix(y)
        tokens = tokens + self.ffn(self.ffn_norm(tokens), size)
        return tokens.mT.unflatten(2, size).contiguous()

    def current_centres(
        self, t: Float[Tensor, "b n c"], unit: Float[Tensor, "b n c"]
    ) -> Float[Tensor, "g c"]:
        """The stored centres, or first ones; in training stepped towards the tokens, and stored."""
        count = len(self.centres)
        centres = torch.where(self.started, self.centres, chunk_centres(t, count).to(self.centres))
        if not self.training:
            return centres
        centres = centres.detach()
        for _ in range(self.iterations - 1):
            centres = next_centres(unit.detach(), F.normalize(centres, dim=-1))
        centres = next_centres(unit, F.normalize(centres, dim=-1))
        if len(t):
            with torch.no_grad():
                moved = self.decay * self.centres + (1 - self.decay) * centres
                self.centres.copy_(torch.where(self.started, moved, centres))
                self.started.fill_(True)
        return centres

    def attend(
        self, t: Float[Tensor, "b n c"], order: Int[Tensor, "b n"], centres: Float[Tensor, "g c"]
    ) -> Float[Tensor, "b n c"]:
        """Each token to the own group and the next one, and, in a softmax of its own, to the centres."""
        (batch, n, _), p = t.shape, self.attention
        size = min(n, self.group_size)
        groups = -(-n // size)
        filled = order[:, reflected(n, (groups + 1) * size, t.device)]
        sorted_ = t.gather(1, filled[..., None].expand(-1, -1, self.dim))
        q = rearrange(p.split(p.query(sorted_[:, :-size])), "b h (g s) d -> (b g) h s d", s=size)
        k, v = (
            rearrange(torch.cat([z[:, :, :-1], z[:, :, 1:]], dim=3), "b h g s d -> (b g) h s d")
            for z in (
                rearrange(p.split(w(sorted_)), "b h (g s) d -> b h g s d", s=size) for w in (p.key, p.value)
            )
        )
        kg, vg = (p.split(w(centres.to(t.dtype))[None]) for w in (self.centre_key, self.centre_value))
        near = attention(q, k, v)
        far = attention(q, kg.expand(len(q), -1, -1, -1), vg.expand(len(q), -1, -1, -1))
        y = rearrange(near + far, "(b g) h s d -> b (g s) (h d)", b=batch, g=groups)[:, :n]
        back = order.argsort(dim=-1)[..., None].expand(-1, -1, self.dim)
        return p.proj(y.gather(1, back))


@register(
    "local-region-self-attention",
    kind="grid",
    paper="catanet",
    tags=("window", "restoration"),
    aliases=("lrsa",),
    spatial=(2,),
    complexity="O(N patch^2 C)",
)
class LocalRegionSelfAttention(Mixer):
    """Attention in patches that overlap by two pixels, then a feed-forward net.

        patches:  p = p + W_o concat_h softmax(q_h k_h^T / sqrt(d)) v_h,   q, k, v of LN(p)
        map:      x = sum of the patches, halved where neighbours overlap;   x = x + ffn(LN(x))

    The last patch is shifted to the border. A pixel in three patches of a row is halved twice, as published.
    Of a map smaller than a patch the whole side is taken.

    dim      channels
    patch    side of a patch, at least 3
    heads    a divisor of dim and of qk_dim
    qk_dim   width of queries and keys
    mlp_dim  hidden width of the feed-forward net

    Source: CATANet, arXiv 2503.06896.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "patch": 4, "heads": 2, "qk_dim": 8, "mlp_dim": 24}

    def __init__(
        self,
        dim: int,
        *,
        patch: int = 16,
        heads: int = 4,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("patch", patch)
        if patch < 3:
            raise ValueError(f"patch is {patch}, must be at least 3: patches overlap by 2")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch = patch
        self.norm = nn.LayerNorm(dim, **where)
        self.attention = _Projections(dim, heads, qk_dim, **where)
        self.ffn_norm = nn.LayerNorm(dim, **where)
        self.ffn = _ConvFFN(dim, mlp_dim, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        batch, _, height, width = x.shape
        (rows, row_share), (columns, column_share) = (
            patch_rows(side, self.patch, x.device) for side in (height, width)
        )
        place = (rows[:, None, :, None] * width + columns[:, None, :]).flatten(0, 1).flatten(1)
        tokens = x.flatten(2).mT
        patches = tokens[:, place.flatten()].unflatten(1, place.shape).flatten(0, 1)
        patches = patches + self.attend(self.norm(patches))
        total = torch.zeros_like(tokens).index_add(
            1, place.flatten(), patches.unflatten(0, (batch, len(place))).flatten(1, 2).to(tokens.dtype)
        )
        share = (row_share[:, None] * column_share).flatten()[:, None]
        tokens = total * share.to(total.dtype)
        tokens = tokens + self.ffn(self.ffn_norm(tokens), (height, width))
        return tokens.mT.unflatten(2, (height, width)).contiguous()

    def attend(self, t: Float[Tensor, "p n c"]) -> Float[Tensor, "p n c"]:
        p = self.attention
        y = attention(p.split(p.query(t)), p.split(p.key(t)), p.split(p.value(t)))
        return p.proj(rearrange(y, "b h n d -> b n (h d)"))


def patch_rows(
    side: int, patch: int, device: torch.device
) -> tuple[Int[Tensor, "patches rows"], Float[Tensor, " side"]]:
    """The rows of each patch along a side, and the factor of each row in the sum over patches."""
    step, size = patch - 2, min(patch, side)
    begins = [min(i, side - size) for i in range(0, side + step - size, step)]
    share = torch.ones(side, device=device)
    for before, begin in itertools.pairwise(begins):
        share[begin : before + size] /= 2
    return torch.tensor(begins, device=device)[:, None] + torch.arange(size, device=device), share
