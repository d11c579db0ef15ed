"""Agent attention: a few pooled queries gather from all tokens, and all tokens read from them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register

_SIDE = 7  # side of the coarse bias tables, whatever the map


class AgentCore(nn.Module):
    """Two softmax attentions through few agents, of tokens that are projected already.

        A = pool(q),  u = softmax(scale A k^T + B1) v,  y = softmax(scale q A^T + B2) u + DWConv3x3(v)

    B1 and B2 are learned: a 7 x 7 table for each agent and head, resized to the map, plus a row and a
    column term of the declared map size. On a map of another size those are resized too.

    size   (height, width) of the maps of queries, in tokens; seen: of the maps of keys, None: the same
    ahead  a class token stands before the map: agents see it and it reads from them, each with a bias of its
           own, but it is neither pooled nor convolved

    Other arguments and errors as in `AgentAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        agents: int,
        size: tuple[int, int],
        seen: tuple[int, int] | None = None,
        ahead: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        check_positive("agents", agents)
        if math.isqrt(agents) ** 2 != agents:
            raise ValueError(f"agents is {agents}, must be a square number")
        if len(size) != 2:
            raise ValueError(f"size is {size}, must be (height, width)")
        for name, side in zip(("size[0]", "size[1]"), size, strict=True):
            check_positive(name, side)
        self.heads = heads
        self.agents = agents
        self.dropout = dropout
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        # Names as the authors': a agent, n token, h row, w column, c class token, in the order of the axes.
        (height, width), (seen_height, seen_width) = size, seen or size
        self.an_bias = _table((heads, agents, _SIDE, _SIDE), device, dtype)
        self.na_bias = _table((heads, agents, _SIDE, _SIDE), device, dtype)
        self.ah_bias = _table((1, heads, agents, seen_height, 1), device, dtype)
        self.aw_bias = _table((1, heads, agents, 1, seen_width), device, dtype)
        self.ha_bias = _table((1, heads, height, 1, agents), device, dtype)
        self.wa_bias = _table((1, heads, 1, width, agents), device, dtype)
        self.ahead = int(ahead)
        if ahead:
            self.ac_bias = _table((1, heads, agents, 1), device, dtype)
            self.ca_bias = _table((1, heads, 1, agents), device, dtype)

    def forward(
        self,
        q: Float[Tensor, "b n c"],
        k: Float[Tensor, "b m c"],
        v: Float[Tensor, "b m c"],
        *,
        size: tuple[int, int],
        seen: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """size and seen: of the maps of queries and of keys in this call, seen None: the same."""
        seen = seen or size
        a = F.adaptive_avg_pool2d(_as_map(q[:, self.ahead :], size), math.isqrt(self.agents))  # 2
        image = _resize(_as_map(v[:, self.ahead :], seen), size)
        a = a.flatten(2).transpose(1, 2)
        q, k, a, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, a, v))
        dropout = self.dropout if self.training else 0.0
        u = attention(a, k, v, bias=self.agent_bias(seen), dropout_p=dropout)  # 3
        y = attention(q, a, u, bias=self.token_bias(size), dropout_p=dropout)  # 4
        local = self.dwc(image).flatten(2).transpose(1, 2)  # 5
        return y.transpose(1, 2).flatten(2) + F.pad(local, (0, 0, self.ahead, 0))

    def agent_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h a m"]:
        """What is added to the logits of agents over tokens, on a map of this size."""
        height, width = size
        rows = _resize(self.ah_bias[0], (height, 1))
        columns = _resize(self.aw_bias[0], (1, width))
        bias = (_resize(self.an_bias, size) + rows + columns).flatten(2)[None]
        return torch.cat([self.ac_bias, bias], dim=-1) if self.ahead else bias

    def token_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h n a"]:
        """What is added to the logits of tokens over agents, on a map of this size."""
        height, width = size
        rows = _resize(self.ha_bias[0].movedim(-1, 1), (height, 1))
        columns = _resize(self.wa_bias[0].movedim(-1, 1), (1, width))
        bias = (_resize(self.na_bias, size) + rows + columns).flatten(2).transpose(1, 2)[None]
        return torch.cat([self.ca_bias, bias], dim=-2) if self.ahead else bias


@register(
    "agent-attention",
    kind="grid",
    paper="agent-attention",
    tags=("linear", "landmarks"),
    spatial=(2,),
    complexity="O(N A C), A agents",
)
class AgentAttention(Mixer):
    """Attention through few agents, the queries averaged over a p x p grid.

        A = pool(q),  u = softmax(scale A k^T + B1) v,  y = W (softmax(scale q A^T + B2) u + DWConv3x3(v))

    with learned biases of places, see `AgentCore`.

    dim       channels
    heads     divides dim
    agents    number of agents, a square p * p; pooling windows are uneven where p does not divide a side
    size      (height, width) of the maps trained on, in tokens
    qkv_bias  whether the projection of queries, keys and values has a bias
    dropout   of the weights of both maps

    Raises ValueError if heads does not divide dim, agents is no square or size is not two sides.
    Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "agents": 4, "size": (9, 7)}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        agents: int = 49,
        size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.core = AgentCore(
            dim, heads=heads, agents=agents, size=size, dropout=dropout, device=device, dtype=dtype
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # 1
        y = self.proj(self.core(q, k, v, size=size))
        return y.transpose(1, 2).unflatten(2, size)


class AgentAttentionDeiT(nn.Module):
    """Agent attention over a class token and the map behind it, as in Agent-DeiT.

    The class token is seen by the agents and reads from them, each with a bias of its own; it is neither
    pooled into agents nor convolved. Takes tokens (b, 1 + height * width, c), class token first.

    Arguments and errors as in `AgentAttention`. Source: Agent Attention, arXiv 2312.08874.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        agents: int = 49,
        size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.core = AgentCore(
            dim,
            heads=heads,
            agents=agents,
            size=size,
            ahead=True,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        """`size` is the (height, width) of the map behind the class token, default the declared one."""
        check_tokens("x", x, self.dim)
        height, width = self.size if size is None else size
        if x.shape[1] != 1 + height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, must have {1 + height * width}: "
                f"a class token and a map of {height} x {width}"
            )
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(self.core(q, k, v, size=(height, width)))


@register(
    "agent-attention-pvt",
    kind="grid",
    paper="agent-attention",
    tags=("linear", "landmarks"),
    spatial=(2,),
    complexity="O(N A C), A agents",
)
class AgentAttentionPVT(Mixer):
    """Agent attention whose keys and values come from a smaller map, as in Agent-PVT.

        s = LN(conv_r(x)),  q = x W_q,  k, v = s W_kv

    conv_r has the size and the stride r; v is resized to the map of the queries (bilinear) before its 3 x 3
    convolution. A map whose sides r does not divide is padded with zeros, below and to the right.

    reduction  r; at 1 there is neither conv_r nor its norm
    Other arguments and errors as in `AgentAttention`. Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "agents": 4, "size": (9, 7), "reduction": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        agents: int = 49,
        size: tuple[int, int] = (14, 14),
        reduction: int = 1,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("reduction", reduction)
        self.reduction = reduction
        self.core = AgentCore(
            dim,
            heads=heads,
            agents=agents,
            size=size,
            seen=(-(-size[0] // reduction), -(-size[1] // reduction)),
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction, device=device, dtype=dtype)
            self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size, r = (x.shape[2], x.shape[3]), self.reduction
        tokens = source = x.flatten(2).transpose(1, 2)
        if r > 1:
            small = self.sr(F.pad(x, (0, -size[1] % r, 0, -size[0] % r)))
            source = self.norm(small.flatten(2).transpose(1, 2))
        k, v = self.kv(source).chunk(2, dim=-1)
        seen = (-(-size[0] // r), -(-size[1] // r))
        y = self.proj(self.core(self.q(tokens), k, v, size=size, seen=seen))
        return y.transpose(1, 2).unflatten(2, size)


@register(
    "agent-attention-cswin",
    kind="grid",
    paper="agent-attention",
    tags=("linear", "landmarks", "window"),
    spatial=(2,),
    complexity="O(N A C), A agents of a stripe",
)
class AgentAttentionCSwin(Mixer):
    """Agent attention in stripes, half of the channels in upright and half in level ones, as in Agent-CSwin.

        q, k, v = W x,   y = W_o concat(upright stripes of the first halves, level ones of the second)

    Each stripe has agents of its own; the biases and the 3 x 3 convolution end at its borders. What a side
    has beyond whole stripes is a narrower one, with resized biases.

    heads   of both halves together, even
    agents  of a stripe
    size    (height, width) of the maps trained on
    stripe  width of the stripes
    Other arguments and errors as in `AgentAttention`. Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "agents": 4, "size": (9, 7), "stripe": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        agents: int = 49,
        size: tuple[int, int] = (14, 14),
        stripe: int = 7,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("stripe", stripe)
        if heads % 2:
            raise ValueError(f"heads is {heads}, must be even: half of them for each direction")

        def core(size: tuple[int, int]) -> AgentCore:
            return AgentCore(
                dim // 2,
                heads=heads // 2,
                agents=agents,
                size=size,
                dropout=dropout,
                device=device,
                dtype=dtype,
            )

        self.stripe = stripe
        self.upright, self.level = core((size[0], stripe)), core((stripe, size[1]))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        qkv = self.qkv(x.movedim(1, -1)).movedim(-1, 1).unflatten(1, (3, self.dim))
        halves = qkv.movedim(1, 0).chunk(2, dim=2)
        y = [
            in_stripes(core, half, stripe=self.stripe, axis=axis)
            for core, half, axis in zip((self.upright, self.level), halves, (-1, -2), strict=True)
        ]
        return self.proj(torch.cat(y, dim=1).movedim(1, -1)).movedim(-1, 1)


def in_stripes(
    core: nn.Module, qkv: Float[Tensor, "3 b c height width"], *, stripe: int, axis: int
) -> Float[Tensor, "b c height width"]:
    """A core within stripes of a map, which is cut every `stripe` tokens along an axis, -1 or -2.

    core: called as `AgentCore`, with tokens q, k, v and their `size`.
    """
    side = qkv.shape[axis]
    outs: list[Tensor] = []
    for part in qkv.split([side - side % stripe, side % stripe], dim=axis):  # whole stripes and the rest
        if not part.shape[axis]:
            continue
        stripes = torch.cat(part.split(min(stripe, part.shape[axis]), dim=axis), dim=1)
        size = (stripes.shape[-2], stripes.shape[-1])
        q, k, v = stripes.flatten(3).mT
        y = core(q, k, v, size=size).mT.unflatten(2, size)
        outs += y.chunk(part.shape[axis] // size[axis]) if len(y) else [part[0]]
    return torch.cat(outs, dim=axis)


def _table(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, device=device, dtype=dtype), std=0.02))


def _resize(table: Float[Tensor, "h a _ _"], size: tuple[int, int]) -> Float[Tensor, "h a height width"]:
    if tuple(table.shape[2:]) == size:
        return table
    return F.interpolate(table, size=size, mode="bilinear", align_corners=False)


def _as_map(x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b c height width"]:
    return x.transpose(1, 2).unflatten(2, size)
