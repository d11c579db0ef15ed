"""Attention modules that stand where a Hugging Face model had its own, with the same call and cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from heedful.convert.report import Cost
from heedful.convert.sites import Site


class ConvertedAttention(nn.Module):
    """What converted attention of all kinds shares: how transformers calls it, and whom it asks to attend.

    Keys and values go through the cache that the model gives, and the weighing through transformers'
    AttentionInterface, so that caches, attention implementations and heedful's taps work as before. The
    output projection is in here also where the model had it elsewhere.

    spec  what builds it again: the name of its kind, and numbers
    """

    kind: ClassVar[str]
    inside: ClassVar[str] = ""  # where the attention is in what this stands for
    num_key_value_groups = 1  # transformers repeats keys and values so often
    o_proj: nn.Linear

    def __init__(self, site: Site, **numbers: Any) -> None:
        super().__init__()
        old = site.module
        self.spec = {"kind": self.kind, **numbers}
        self.config, self.layer_idx, self.is_causal = old.config, old.layer_idx, old.is_causal
        self.scaling, self.head_dim, self.rotary = old.scaling, site.head_dim, site.rotary
        self.attention_dropout = getattr(old, "attention_dropout", 0.0) if site.rotary else old.dropout.p
        self.sliding_window = getattr(old, "sliding_window", getattr(old.config, "sliding_window", None))
        self.train(old.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "b n c"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,  # its name since transformers 5.24
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b n c"], Tensor | None]:
        cache = past_key_values if cache is None else cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        heads, weights = self.heads_of(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return self.o_proj(heads.flatten(-2)), weights

    def heads_of(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        """What the heads put out."""
        raise NotImplementedError

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m e"],
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        """Softmax attention as the model's attention implementation has it."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        dropout = self.attention_dropout if self.training else 0.0
        return function(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def cost(self, context: int) -> Cost:
        """See `Cost`."""
        count = sum(p.numel() for p in self.parameters())
        cached = self.cached_numbers * self.o_proj.weight.element_size() if self.is_causal else 0
        return Cost(self.what, count, cached, self.multiply_adds(context))

    @property
    def what(self) -> str:
        """The heads, in words."""
        raise NotImplementedError

    @property
    def cached_numbers(self) -> int:
        """Numbers kept for each token while decoding."""
        raise NotImplementedError

    def multiply_adds(self, context: int) -> int:
        """Of one token that sees `context` tokens, the others' keys and values being there."""
        raise NotImplementedError


class HeadsAttention(ConvertedAttention):
    """Query heads that share key heads by one map and value heads by another.

        o_h = softmax(q_h k_K(h)^T scale) v_V(h)

    site                the attention that it stands for, whose norms of queries and keys it takes over
    key_map, value_map  of each query head its key head and its value head, every one at least once

    The projections are filled by `fill`. Raises ValueError if a map leaves out a head.
    """

    kind = "heads"
    q_norm: Any
    k_norm: Any

    def __init__(self, site: Site, *, key_map: Sequence[int], value_map: Sequence[int], **more: Any) -> None:
        super().__init__(site, key_map=list(key_map), value_map=list(value_map), **more)
        for name, given in (("key_map", key_map), ("value_map", value_map)):
            if not given or set(given) != set(range(max(given) + 1)):
                raise ValueError(f"{name} is {list(given)}, must name heads 0, 1, ... with none left out")
        if len(key_map) != len(value_map):
            raise ValueError(f"value_map has {len(value_map)} heads, must have {len(key_map)} as key_map has")
        self.key_map, self.value_map = list(key_map), list(value_map)
        self.heads, self.key_heads, self.value_heads = len(key_map), max(key_map) + 1, max(value_map) + 1
        groups = self.heads // self.key_heads
        # Runs of neighbours need no view of their own for each query head.
        self.regular = self.key_map == self.value_map == [h // groups for h in range(self.heads)]
        self.num_key_value_groups = groups if self.regular else 1
        d, dim = self.head_dim, site.query.in_features
        self.q_proj = empty_linear(dim, self.heads * d, site.query)
        self.k_proj = empty_linear(dim, self.key_heads * d, site.key)
        self.v_proj = empty_linear(dim, self.value_heads * d, site.value)
        self.o_proj = empty_linear(self.heads * d, dim, site.out)
        self.q_norm, self.k_norm = (getattr(site.module, name, None) for name in ("q_norm", "k_norm"))

    def fill(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Self:
        """Take the weights of query, key, value (h, d, c) and out (c, h, d), and the biases."""
        query, key, value, out = weights
        given = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), out.flatten(1))
        for linear, weight, bias in zip(
            (self.q_proj, self.k_proj, self.v_proj, self.o_proj), given, biases, strict=True
        ):
            with torch.no_grad():
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias.flatten())
        return self

    def heads_of(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        query, key, value = (
            rearrange(y, "b n (h d) -> b n h d", d=self.head_dim)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        self.look(query)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        if self.rotary:
            assert angles is not None
            query, key = apply_rotary_pos_emb(query, key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if not self.regular:
            key = key.index_select(1, torch.tensor(self.key_map, device=key.device))
            value = value.index_select(1, torch.tensor(self.value_map, device=key.device))
        return self.attend(query, key, value, mask, **kwargs)

    def look(self, query: Float[Tensor, "b n h d"]) -> None:
        """See the queries as they leave their projection."""

    @property
    def what(self) -> str:
        if self.key_map != self.value_map:
            return f"{self.heads} heads, {self.key_heads} K, {self.value_heads} V"
        kv = "" if self.key_heads == self.heads else f", {self.key_heads} KV"
        return f"{self.heads} heads{kv}"

    @property
    def cached_numbers(self) -> int:
        return (self.key_heads + self.value_heads) * self.head_dim

    def multiply_adds(self, context: int) -> int:
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return sum(linear.weight.numel() for linear in linears) + 2 * context * self.heads * self.head_dim


def empty_linear(inside: int, outside: int, like: nn.Linear, *, bias: bool | None = None) -> nn.Linear:
    """A layer to be filled, in the dtype and on the device of another; bias None: if that one has a bias."""
    made = nn.utils.skip_init(
        nn.Linear,
        inside,
        outside,
        like.bias is not None if bias is None else bias,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    return made.requires_grad_(like.weight.requires_grad)
