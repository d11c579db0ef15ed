"""Hierarchical self-attention: softmax attention tied by a tree over the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.hierarchical import Tree, causal_hierarchical_attention, hierarchical_attention
from heedful.registry import register


@dataclass(frozen=True)
class HierarchicalState(KVState):
    """Queries beside keys and values: means of queries end with the token that asks."""

    query: Float[Tensor, "b h m d"] | None = None


@register(
    "hierarchical-self-attention",
    kind="sequence",
    paper="hierarchical-self-attention",
    tags=("sparse", "softmax", "tree"),
    causal="optional",
    decode=True,
    extra_inputs=("tree",),
    complexity="O(N K C), K children a node",
)
class HierarchicalSelfAttention(Mixer):
    """Attention in which the leaves of one subtree give one weight to all leaves of a sibling.

        Q = argmin over tied, row-stochastic Q of sum_i KL(Q_i || softmax_j(q_i . k_j / sqrt(d)))
        y = concat_h(Q_h v_h) W_o

    computed by a dynamic programme over the tree (`heedful.ops.hierarchical`). With one level it is softmax
    attention. There are no weights beyond the projections, so those of a trained layer serve.

    dim        channels
    heads      heads, a divisor of `dim`
    branching  children of a node where no tree is given: neighbouring tokens, then neighbouring nodes
    qk_norm    layer norm, without scale and shift, of each query and key; the derivation wants it, weights of
               a layer trained without it do not
    self_term  False: no token gives weight to itself
    causal     heedful's form for generation: a node sees the siblings before it, on the tree of the tokens so
               far; needed to decode
    qkv_bias   biases in W_q, W_k, W_v; W_o always has one

    forward: mask (b, n) takes tokens out of the tree; `tree`, a `Tree` over the n tokens, such as sentences
    of paragraphs, stands in for the regular one; `positions` has no effect.
    Raises ValueError if heads does not divide dim, for branching below 2, for self_term=False or a tree with
    `causal`, and for a context.
    Source: Hierarchical Self-Attention, arXiv 2509.15448.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "branching": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        branching: int = 16,
        qk_norm: bool = True,
        self_term: bool = True,
        causal: bool = False,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("branching", branching)
        if branching < 2:
            raise ValueError(f"branching is {branching}, must be at least 2")
        if causal and not self_term:
            raise ValueError(
                "self_term is False, must be True with causal: the first token sees itself alone"
            )
        self.heads, self.head_dim, self.branching = heads, dim // heads, branching
        self.qk_norm, self.self_term, self.causal = qk_norm, self_term, causal
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def init_state(self, batch: int) -> HierarchicalState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return HierarchicalState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: HierarchicalState | None = None,
        tree: Tree | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], HierarchicalState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if tree is not None and self.causal:
            raise ValueError("tree is given, must be None with causal: it goes by `branching`")
        if state is not None and not self.causal:
            raise ValueError("state is given, must be None: this instance does not decode")
        n = x.shape[1]
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query, key = (F.layer_norm(t, t.shape[-1:]).to(value.dtype) for t in (query, key))
        if self.causal:
            if state is not None:
                old, kv = state.query, state.append(key, value, mask)
                query = query if old is None else torch.cat([old, query], dim=2)
                state = HierarchicalState(kv.length, kv.key, kv.value, kv.mask, query)
                assert kv.key is not None
                assert kv.value is not None
                key, value, mask = kv.key, kv.value, kv.mask
            heads = causal_hierarchical_attention(query, key, value, self.branching, mask=mask)
            heads = heads[:, :, heads.shape[2] - n :]
        else:
            tree = Tree.regular(max(1, n), self.branching, device=x.device) if tree is None else tree
            given = hierarchical_attention(query, key, value, tree, self_term=self.self_term, mask=mask)
            assert isinstance(given, Tensor)
            heads = given
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)
