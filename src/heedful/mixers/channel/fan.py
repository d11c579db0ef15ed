"""Channel processing of FAN: an MLP whose channels are weighed by how they are spread over the tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "fan-channel-processing",
    kind="channel",
    paper="tap-adl",
    tags=("channel attention", "mlp"),
    spatial=(2,),
    complexity="O(N C hidden)",
)
class ChannelProcessing(Mixer):
    """A gate for every channel times an MLP with convolutions, in heads of channels.

        q = softmax_n(W_q x),   k = mean_{c in head} softmax_n(x)
        a = temperature_head sigmoid(sum_n q_nc k_n)
        h = W_1 x,   h = h + gamma dw(BatchNorm(gelu(dw(h))))      dw: depthwise 3 x 3
        y = a LN(W_2 h)

    dim       channels
    heads     a divisor of dim, each with a temperature
    hidden    width of the MLP; None: 4 dim
    qkv_bias  a bias in W_q, as in the published models; the softmax over tokens does not see it
    eps       of the layer norm

    Raises ValueError if heads do not divide dim. Source: the network around token-aware pooling in
    Robustifying Token Attention for Vision Transformers, arXiv 2303.11126.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "hidden": 12, "qkv_bias": False}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        hidden: int | None = None,
        qkv_bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        hidden = 4 * dim if hidden is None else hidden
        check_positive("hidden", hidden)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, **made))
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **made)
        self.fc1 = nn.Linear(dim, hidden, **made)
        self.conv1 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **made)
        self.bn = nn.BatchNorm2d(hidden, **made)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **made)
        self.gamma = nn.Parameter(torch.ones(hidden, **made))
        self.fc2 = nn.Linear(hidden, dim, **made)
        self.norm = nn.LayerNorm(dim, eps=eps, **made)

    def gate(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        """The factor of every channel."""
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads).softmax(2)
        key = rearrange(x, "b n (h d) -> b h n d", h=self.heads).softmax(2).mean(3)
        score = torch.einsum("bhnd,bhn->bhd", query, key.to(query.dtype))
        return (score.sigmoid() * self.temperature[:, None]).flatten(1)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        tokens = x.movedim(1, -1)
        gate = self.gate(tokens.flatten(1, 2))
        hidden = self.fc1(tokens).movedim(-1, 1)
        local = self.conv2(self.bn(F.gelu(self.conv1(hidden))))
        hidden = (hidden + self.gamma[:, None, None] * local).movedim(1, -1)
        value = self.norm(self.fc2(hidden))
        return (gate[:, None, None].to(value.dtype) * value).movedim(-1, 1)
