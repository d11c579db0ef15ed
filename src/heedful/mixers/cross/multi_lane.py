"""The attention of MULTI-LANE: selectors summarise a frozen stream, a class token reads the summaries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "multi-lane",
    kind="cross",
    paper="multi-lane",
    tags=("summary", "prompts", "continual learning"),
    aliases=("summarized-pathway-attention",),
    extra_inputs=("task",),
    complexity="O(N S C + S (S + P) C)",
)
class SummarizedPathwayAttention(Mixer):
    """The lane of a task: [class token, S selectors] beside the tokens z of another stream.

        u_s = sum_n softmax_n(x_s . z_n / sqrt(dim)) z_n                       s = 1 .. S, z detached
        k, v = [prompts, W_k [x_0, u]],  [prompts', W_v [x_0, u]]               in heads, d = dim / heads
        y_0 = W_o softmax((W_q x_0) k^T / sqrt(d)) v,    y_s = x_s              summaries are dropped

    dim       channels
    heads     a divisor of dim
    prompts   P, keys and values of every task that stand before those of its lane; 0: none
    tasks     lanes with prompts of their own
    qkv_bias  a bias in W_q, W_k, W_v

    forward: x (b, 1 + s, c), context (b, n, c), context_mask (b, n) with True = may be seen, and the number
    `task` of the lane. `lanes` runs several at once; `stream` is self-attention of the context with the same
    weights. Raises ValueError if heads do not divide dim, for an unknown task and on wrong shapes.
    Source: Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning,
    arXiv 2405.15633.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "prompts": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        prompts: int = 20,
        tasks: int = 1,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("tasks", tasks)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.tasks = heads, tasks
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.prompts: nn.Parameter | None = None
        if prompts:
            check_positive("prompts", prompts)
            self.prompts = nn.Parameter(torch.empty(2, tasks, prompts, heads, dim // heads, **made))
            for own in self.prompts.data.flatten(0, 1):
                nn.init.orthogonal_(own.view(prompts, dim))

    def stream(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Ordinary self-attention, with the weights of the lanes."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))

    def lanes(
        self,
        x: Float[Tensor, "t b n c"],
        context: Float[Tensor, "b m c"],
        *,
        context_mask: Bool[Tensor, "b m"] | None = None,
        first: int = 0,
    ) -> Float[Tensor, "t b n c"]:
        """The lanes of the tasks first, first + 1, ... over one context."""
        tasks = len(x)
        cls, selectors = x[:, :, :1], x[:, :, 1:]
        # 1. Every selector summarises the context.
        source = context.detach()[:, None].to(x.dtype)
        queries = rearrange(selectors, "t b s c -> b 1 (t s) c")
        summaries = attention(queries, source, source, scale=self.dim**-0.5, key_mask=context_mask)
        summaries = rearrange(summaries, "b 1 (t s) c -> t b s c", t=tasks)
        # 2. The class token attends to itself, the summaries and the prompts.
        weight = self.qkv.weight.split((self.dim, 2 * self.dim))
        bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split((self.dim, 2 * self.dim))
        query = rearrange(F.linear(cls, weight[0], bias[0]), "t b n (h d) -> (t b) h n d", h=self.heads)
        both = F.linear(torch.cat([cls, summaries], dim=2), weight[1], bias[1])
        both = rearrange(both, "t b n (two h d) -> two t b n h d", two=2, h=self.heads)
        if self.prompts is not None:
            prompts = self.prompts[:, first : first + tasks, None].expand(-1, -1, x.shape[1], -1, -1, -1)
            both = torch.cat([prompts.to(both.dtype), both], dim=3)
        key, value = rearrange(both, "two t b n h d -> two (t b) h n d")
        y = rearrange(attention(query, key, value), "(t b) h n d -> t b n (h d)", t=tasks)
        # 3. The summaries are dropped, and the selectors stand in their place again.
        return torch.cat([self.proj(y), selectors], dim=2)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        task: int = 0,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
        if not 0 <= task < self.tasks:
            raise ValueError(f"task is {task}, must be 0 to {self.tasks - 1}")
        return self.lanes(x[None], context, context_mask=context_mask, first=task)[0]

    def example_inputs(self, *, length: int = 11, **how: Any) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        inputs = super().example_inputs(length=length, **how)
        context = super().example_inputs(length=7, **{**how, "seed": how.get("seed", 0) + 1})["x"]
        return {**inputs, "context": context}
