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


@register(
    "agent-attention",
    kind="grid",
    paper="agent-attention",
    tags=("linear", "landmarks"),
    spatial=(2,),
    complexity="O(N A C), A agents",
)
class AgentAttention(Mixer):
    """Two softmax attentions through few agents, the queries averaged over a p x p grid.

        A = pool(q),  u = softmax(scale A k^T + B1) v,  y = W (softmax(scale q A^T + B2) u + DWConv3x3(v))

    B1 and B2 are learned: a 7 x 7 table for each agent and head, resized to the map, plus a row and a
    column term of the declared map size. On a map of another size those are resized too.

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
        self.size = size
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        # Names as the authors': a agent, n token, h row, w column, in the order of the map's axes.
        height, width = size
        self.an_bias = _table((heads, agents, _SIDE, _SIDE), device, dtype)
        self.na_bias = _table((heads, agents, _SIDE, _SIDE), device, dtype)
        self.ah_bias = _table((1, heads, agents, height, 1), device, dtype)
        self.aw_bias = _table((1, heads, agents, 1, width), device, dtype)
        self.ha_bias = _table((1, heads, height, 1, agents), device, dtype)
        self.wa_bias = _table((1, heads, 1, width, agents), device, dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        y = self._mix(x.flatten(2).transpose(1, 2), size)
        return y.transpose(1, 2).unflatten(2, size)

    def agent_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h a n"]:
        """What is added to the logits of agents over tokens, on a map of this size."""
        height, width = size
        rows = _resize(self.ah_bias[0], (height, 1))
        columns = _resize(self.aw_bias[0], (1, width))
        return (_resize(self.an_bias, size) + rows + columns).flatten(2)[None]

    def token_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h n a"]:
        """What is added to the logits of tokens over agents, on a map of this size."""
        height, width = size
        rows = _resize(self.ha_bias[0].movedim(-1, 1), (height, 1))
        columns = _resize(self.wa_bias[0].movedim(-1, 1), (1, width))
        return (_resize(self.na_bias, size) + rows + columns).flatten(2).transpose(1, 2)[None]

    def _mix(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """The mechanism on tokens; those ahead of the map (a class token) are not pooled or convolved."""
        ahead = x.shape[1] - size[0] * size[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # 1
        a = F.adaptive_avg_pool2d(_as_map(q[:, ahead:], size), math.isqrt(self.agents))  # 2
        a = a.flatten(2).transpose(1, 2)
        q, k, a, values = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, a, v))
        dropout = self.dropout if self.training else 0.0
        u = attention(a, k, values, bias=self.agent_bias(size), dropout_p=dropout)  # 3
        y = attention(q, a, u, bias=self.token_bias(size), dropout_p=dropout)  # 4
        y = y.transpose(1, 2).flatten(2)
        local = self.dwc(_as_map(v[:, ahead:], size)).flatten(2).transpose(1, 2)  # 5
        return self.proj(y + F.pad(local, (0, 0, ahead, 0)))


class AgentAttentionDeiT(AgentAttention):
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
        super().__init__(
            dim,
            heads=heads,
            agents=agents,
            size=size,
            qkv_bias=qkv_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.ac_bias = _table((1, heads, agents, 1), device, dtype)
        self.ca_bias = _table((1, heads, 1, agents), device, dtype)

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
        return self._mix(x, (height, width))

    def agent_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h a n"]:
        return torch.cat([self.ac_bias, super().agent_bias(size)], dim=-1)

    def token_bias(self, size: tuple[int, int]) -> Float[Tensor, "1 h n a"]:
        return torch.cat([self.ca_bias, super().token_bias(size)], dim=-2)


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
