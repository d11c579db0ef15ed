"""Multi-head latent attention: keys and values of all heads made from one narrow latent a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_mask, check_no_context, check_positions, check_positive, check_tokens
from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.ops.rotary import Yarn, rotate
from heedful.patterns.causal import Causal
from heedful.registry import register


@dataclass(frozen=True)
class LatentState(State):
    """The latents of all tokens seen, each followed by its rotary key; mask (b, m) once one was given."""

    latent: Float[Tensor, "b m width"] | None = None
    mask: Bool[Tensor, "b m"] | None = None

    def append(
        self, latent: Float[Tensor, "b n width"], mask: Bool[Tensor, "b n"] | None = None
    ) -> LatentState:
        """The state after n more tokens."""
        batch, new = latent.shape[:2]
        if mask is not None or self.mask is not None:
            old = self.mask if self.mask is not None else latent.new_ones(batch, self.length).bool()
            mask = torch.cat([old, mask if mask is not None else old.new_ones(batch, new)], dim=1)
        if self.latent is not None:
            latent = torch.cat([self.latent, latent], dim=1)
        return LatentState(self.length + new, latent, mask)


@register(
    "multi-head-latent-attention",
    kind="sequence",
    paper="x-ecomla",
    tags=("heads", "softmax", "low-rank", "latent"),
    aliases=("mla", "x-ecomla"),
    causal="optional",
    decode=True,
    complexity="O(N^2 heads (nope_dim + rope_dim + value_dim))",
    exempt={"constructor_errors": "any number of heads fits: their widths are arguments of their own"},
)
class MultiHeadLatentAttention(Mixer):
    """Attention whose keys and values are projected up, head by head, from one latent a token.

        q_h = W_qb,h RMS(W_qa x),  [c, k^r] = W_kva x,  [k_h, v_h] = W_kvb,h RMS(c)
        s_hij = (q^n_hi . k_hj + q^r_hi . k^r_j) / sqrt(d_n + d_r)
        y = concat_h(softmax(s_h) v_h) W_o

    q_h is cut into q^n of d_n channels and q^r of d_r; q^r and the one k^r that all heads share are turned
    (rotary, channel 2 j with 2 j + 1), nothing else is. Nothing has a bias.

    dim          channels
    heads        heads, each with its own queries, keys and values
    query_rank   channels between W_qa and W_qb; None: one matrix `query` and no norm in their place
    kv_rank      channels of the latent c, r
    nope_dim     channels of a head that know no position, d_n
    rope_dim     channels of a head that are turned, d_r, an even number; 0: none
    value_dim    channels of a head's values
    latent_norm  RMS normalisation of both latents, eps 1e-6; False: none, as a converted model has it
    rotary_base  of the rotary embedding
    yarn         `heedful.ops.rotary.Yarn`, or its arguments, for texts longer than those of the training
    causal       a token sees itself and what came before; needed to decode
    dropout      share of the attention weights dropped in training

    Two forms give the same: `expanded` makes keys and values of every head, and serves training and prefill;
    `absorbed` moves W_kvb over to the queries and the result, reads the latents alone, and continues a state.
    State: kv_rank + rope_dim numbers a token. forward: mask (b, n) hides tokens as keys.
    Raises ValueError on wrong shapes, or if a context is given.
    Source: DeepSeek-V2, arXiv 2405.04434; X-EcoMLA, arXiv 2503.11132.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "query_rank": 12,
        "kv_rank": 8,
        "nope_dim": 4,
        "rope_dim": 2,
        "value_dim": 5,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        query_rank: int | None = 1536,
        kv_rank: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        latent_norm: bool = True,
        rotary_base: float = 10000.0,
        yarn: Yarn | Mapping[str, float] | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        sizes = {"heads": heads, "kv_rank": kv_rank, "nope_dim": nope_dim, "value_dim": value_dim}
        if query_rank is not None:
            sizes["query_rank"] = query_rank
        for name, number in sizes.items():
            check_positive(name, number)
        if rope_dim < 0 or rope_dim % 2:
            raise ValueError(f"rope_dim is {rope_dim}, must be an even number of at least 0")
        self.heads, self.kv_rank = heads, kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.rotary_base, self.causal, self.dropout = rotary_base, causal, dropout
        self.yarn = Yarn(**yarn) if isinstance(yarn, Mapping) else yarn  # type: ignore[arg-type]
        self.scale = (nope_dim + rope_dim) ** -0.5
        if self.yarn is not None:
            self.scale *= self.yarn.logit_factor
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        query_dim = heads * (nope_dim + rope_dim)
        self.query_norm = self.kv_norm = None
        if query_rank is None:
            self.query = nn.Linear(dim, query_dim, bias=False, **factory)
        else:
            self.query_down = nn.Linear(dim, query_rank, bias=False, **factory)
            self.query_up = nn.Linear(query_rank, query_dim, bias=False, **factory)
            if latent_norm:
                self.query_norm = nn.RMSNorm(query_rank, eps=1e-6, **factory)
        self.query_rank = query_rank
        self.kv_down = nn.Linear(dim, kv_rank + rope_dim, bias=False, **factory)
        self.kv_up = nn.Linear(kv_rank, heads * (nope_dim + value_dim), bias=False, **factory)
        if latent_norm:
            self.kv_norm = nn.RMSNorm(kv_rank, eps=1e-6, **factory)
        self.out = nn.Linear(heads * value_dim, dim, bias=False, **factory)

    def init_state(self, batch: int) -> LatentState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return LatentState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: LatentState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], LatentState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        query, latent = self.project(x, positions=positions, state=state)
        form, seen = self.expanded, mask
        if state is not None:
            # Many new tokens are cheaper with keys of their own; few behind many old ones are not.
            form = self.absorbed if state.length else self.expanded
            state = state.append(latent, mask)
            assert state.latent is not None
            latent, seen = state.latent, state.mask
        y = self.out(rearrange(form(query, latent, mask=seen), "b h n e -> b n (h e)"))
        return y if state is None else (y, state)

    def project(
        self,
        x: Float[Tensor, "b n c"],
        *,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: LatentState | None = None,
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b n width"]]:
        """Queries [q^n, q^r], and what is kept of a token: [RMS(c), k^r]."""
        # 1. Queries, through their own latent.
        if self.query_rank is None:
            query = self.query(x)
        else:
            query = self.query_up(_normed(self.query_norm, self.query_down(x)))
        query = rearrange(query, "b n (h d) -> b h n d", h=self.heads)
        # 2. The latent of keys and values, and the rotary key.
        latent, key = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latent = _normed(self.kv_norm, latent)
        # 3. Rotary embedding of the last d_r channels.
        if self.rope_dim:
            angles = next_angles(x, self.rope_dim, positions, state, base=self.rotary_base)
            if self.yarn is not None:
                angles = angles * self.yarn.slowing(self.rope_dim, self.rotary_base).to(angles)
            length = 1.0 if self.yarn is None else self.yarn.length
            turn = (length * angles.cos(), length * angles.sin())
            plain, turned = query.split([self.nope_dim, self.rope_dim], dim=-1)
            query = torch.cat([plain, rotate(turned, turn, pairing="interleaved")], dim=-1)
            key = rotate(key[:, None], turn, pairing="interleaved")[:, 0]
        return query, torch.cat([latent, key], dim=-1)

    def keys_values(
        self, latent: Float[Tensor, "b m width"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m e"]]:
        """Keys and values of all heads, from latents and rotary keys."""
        latent, shared = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        both = rearrange(self.kv_up(latent), "b m (h d) -> b h m d", h=self.heads)
        key, value = both.split([self.nope_dim, self.value_dim], dim=-1)
        key = torch.cat([key, shared[:, None].expand(-1, self.heads, -1, -1)], dim=-1)
        return key, value

    def expanded(
        self,
        query: Float[Tensor, "b h n d"],
        latent: Float[Tensor, "b m width"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """What the heads give to W_o, with keys and values of every head."""
        key, value = self.keys_values(latent)
        return self._attend(query, key, value, mask)

    def absorbed(
        self,
        query: Float[Tensor, "b h n d"],
        latent: Float[Tensor, "b m width"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """The same, as multi-query attention of width r + d_r over the latents themselves."""
        up = rearrange(self.kv_up.weight, "(h d) r -> h d r", h=self.heads)
        key_up, value_up = up.split([self.nope_dim, self.value_dim], dim=1)
        plain, turned = query.split([self.nope_dim, self.rope_dim], dim=-1)
        query = torch.cat([torch.einsum("bhnd,hdr->bhnr", plain, key_up), turned], dim=-1)
        key = latent[:, None]
        weighed = self._attend(query, key, key[..., : self.kv_rank], mask)
        return torch.einsum("bhnr,her->bhne", weighed, value_up)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attention(
            query,
            key,
            value,
            pattern=Causal() if self.causal else None,
            scale=self.scale,
            key_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )


def _normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    # Under autocast x is in half precision while the norm's weight is not.
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)
