"""Modules that take the place of PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.ops.attention import attention, merge_partials
from heedful.patterns.causal import Causal
from heedful.patterns.pattern import Pattern


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that takes any heedful pattern.

        y = concat_h(softmax(q_h k_h^T / sqrt(d) + masks) v_h) W_o + b_o

    Arguments, names of the weights, initial values and results are PyTorch's, and so are its masks: True
    in a boolean attn_mask (n, m) or (b * heads, n, m) or key_padding_mask (b, m) means hidden, a float mask
    is added to the logits; mask and pattern hide together. What differs:
      pattern    who sees whom, for every call or, in `forward`, for one; with need_weights=False its cost
                 is that of the visible pairs
      is_causal  without attn_mask hides the future (PyTorch refuses that); with one the mask alone counts
      a query that sees nothing gives the bias of W_o, and weights of zero, where PyTorch gives NaN
    The keys that add_bias_kv and add_zero_attn append are seen by every query. Nested tensors are not taken.

    Raises ValueError if num_heads does not divide embed_dim, and on masks of other shapes.
    Source: Attention Is All You Need, arXiv 1706.03762.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
    ) -> None:
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.pattern = pattern
        # PyTorch's encoder layers read this: True lets them skip `forward` and compute without the pattern.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Float[Tensor, "... e"],
        key: Float[Tensor, "... k"],
        value: Float[Tensor, "... v"],
        key_padding_mask: Shaped[Tensor, "..."] | None = None,
        need_weights: bool = True,
        attn_mask: Shaped[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        pattern: Pattern | None = None,
    ) -> tuple[Float[Tensor, "... e"], Float[Tensor, "..."] | None]:
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        pattern = self.pattern if pattern is None else pattern
        if is_causal and attn_mask is None:
            pattern = Causal() if pattern is None else Causal() & pattern

        q, k, v = self._project(query, key, value)
        bias, key_mask = self._masks(attn_mask, key_padding_mask, (q.shape[0], q.shape[2], k.shape[2]))
        bias = None if bias is None else bias.to(q.dtype)
        extra = self._extra(q)
        weights = None
        if need_weights:
            weights = self._weights(q, k, pattern, bias, key_mask, extra)
            v = v if extra is None else torch.cat([v, extra[1]], dim=2)
            heads = weights @ v
        else:
            dropout = self.dropout if self.training else 0.0
            parts = [
                attention(
                    q,
                    k,
                    v,
                    pattern=pattern,
                    bias=bias,
                    key_mask=key_mask,
                    dropout_p=dropout,
                    return_lse=extra is not None,
                )
            ]
            if extra is not None:
                parts.append(attention(q, *extra, dropout_p=dropout, return_lse=True))
            heads = parts[0] if extra is None else merge_partials(parts)[0]  # type: ignore[assignment, arg-type]
        y = self.out_proj(rearrange(heads, "b h n d -> b n (h d)"))

        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(F.linear(x, w, b), "b n (h d) -> b h n d", h=self.num_heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """PyTorch's masks as a bias for the logits and a mask of the keys that may be seen."""
        b, n, m = sizes
        bias = key_mask = None
        if attn_mask is not None:
            if attn_mask.shape not in ((n, m), (b * self.num_heads, n, m)):
                raise ValueError(
                    f"attn_mask has shape {tuple(attn_mask.shape)}, "
                    f"must be {(n, m)} or {(b * self.num_heads, n, m)}"
                )
            bias = attn_mask
            if attn_mask.dtype == torch.bool:
                bias = torch.zeros(attn_mask.shape, device=attn_mask.device).masked_fill(
                    attn_mask, -torch.inf
                )
            bias = bias.view(-1, self.num_heads if attn_mask.ndim == 3 else 1, n, m)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (b, m):
                raise ValueError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, must be {(b, m)}"
                )
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                padding = key_padding_mask[:, None, None, :]
                bias = padding if bias is None else bias + padding
        return bias, key_mask

    def _extra(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every query sees besides those given: the biases and the zero."""
        b, h, _, d = query.shape
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(1, h, 1, d).expand(b, h, 1, d))
            values.append(self.bias_v.view(1, h, 1, d).expand(b, h, 1, d))
        if self.add_zero_attn:
            keys.append(query.new_zeros(b, h, 1, d))
            values.append(query.new_zeros(b, h, 1, d))
        return (torch.cat(keys, 2).to(query.dtype), torch.cat(values, 2).to(query.dtype)) if keys else None

    def _weights(
        self,
        query: Tensor,
        key: Tensor,
        pattern: Pattern | None,
        bias: Tensor | None,
        key_mask: Tensor | None,
        extra: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The dense attention weights, (b, h, n, m + number of extra keys), after dropout."""
        query = query * self.head_dim**-0.5
        logits = query @ key.mT
        if bias is not None:
            logits = logits + bias
        if pattern is not None:
            mask = pattern.mask(query.shape[2], key.shape[2], device=query.device)
            logits = logits.masked_fill(~mask, -torch.inf)
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        if extra is not None:
            logits = torch.cat([logits, query @ extra[0].mT], dim=-1)
        blind = (logits == -torch.inf).all(-1, keepdim=True)
        weights = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        return torch.dropout(weights, self.dropout, self.training)
