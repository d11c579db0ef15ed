"""Multi-head attention made a mixture of heads, without parameters of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from heedful.convert.attention import HeadsAttention
from heedful.convert.gqa import merged
from heedful.convert.model import convert
from heedful.convert.report import Report
from heedful.convert.sites import Site, choose_sites
from heedful.registry import register
from heedful.routing.head_gate import check_shares, chosen, default_shares, load_balance


@register("to-moh", kind="convert", paper="moh", tags=("heads", "router", "surgery"))
def to_moh(
    model: PreTrainedModel,
    *,
    shared_heads: int | None = None,
    routed_heads: int | None = None,
    balance: float = 0.01,
    layers: Sequence[int] | None = None,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model each of whose tokens switches off the heads whose queries are short.

        l_r = |q_r| of the heads r >= S, as they leave their projection
        heads_h = m_h softmax(q_h k_g^T scale) v_g,  m = 1 for the first S heads and the K largest l, else 0

    model         of the Llama kind (llama, mistral, qwen2, qwen3) or of the BERT kind
    shared_heads  S; None: half of the heads
    routed_heads  K; None: half of the others. All of them: nothing changes
    balance       weight of the loss of uneven use, the mean over the layers, of which each has its share in
                  `aux_losses` while it trains
    layers        numbers of the layers to convert; None: all
    copy          False changes the model itself
    context       tokens that a token sees in the report's multiply-adds

    No parameter is added and all heads are computed; the cache holds all, since a later token may choose any.
    `recover(model, None, batches, kl_weight=0, ce_weight=1)` goes on training as published: on the next
    tokens, with the losses of uneven use.
    Raises ValueError for another model and for numbers that do not fit.
    Source: MoH, arXiv 2410.11842, the form of MoH-LLaMA3-8B.
    """
    sites = choose_sites(model, layers)
    heads = sites[0].heads
    shared_heads, routed_heads = default_shares(heads, shared_heads, routed_heads)
    check_shares(heads, shared_heads, routed_heads)
    numbers = {"shared": shared_heads, "routed": routed_heads, "balance": balance / len(sites)}

    def make(site: Site) -> MixtureOfHeadsAttention:
        each = list(range(site.kv_heads))
        return merged(site, each, each, MixtureOfHeadsAttention, **numbers)

    what = f"{shared_heads} shared heads, {routed_heads} of {heads - shared_heads} routed"
    return convert(model, what, make, layers=layers, copy=copy, context=context)


class MixtureOfHeadsAttention(HeadsAttention):
    """Attention with heads that are on for some tokens alone; see the mixer `moh-llama`.

    In training `aux_losses["load_balance"]` tells, weighed, how unevenly the routed heads are used, padding
    included.
    """

    kind = "moh"

    def __init__(
        self,
        site: Site,
        *,
        key_map: Sequence[int],
        value_map: Sequence[int],
        shared: int,
        routed: int,
        balance: float,
    ) -> None:
        super().__init__(
            site, key_map=key_map, value_map=value_map, shared=shared, routed=routed, balance=balance
        )
        self.shared, self.routed, self.balance = shared, routed, balance
        self.aux_losses: dict[str, Tensor] = {}
        self._on: Bool[Tensor, "b n h"] | None = None

    def look(self, query: Float[Tensor, "b n h d"]) -> None:
        on = torch.ones(query.shape[:3], dtype=torch.bool, device=query.device)
        self.aux_losses = {}
        if self.routed:
            length = query[:, :, self.shared :].float().norm(dim=-1)
            taken = chosen(length, self.routed)
            on = torch.cat([on[:, :, : self.shared], taken], dim=-1)
            if self.training:
                spread = length.std(-1, keepdim=True) if length.shape[-1] > 1 else 1.0
                probability = (length / (spread + 1e-12)).softmax(-1)
                self.aux_losses = {"load_balance": self.balance * load_balance(probability, taken)}
        self._on = on

    def heads_of(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        heads, weights = super().heads_of(x, angles, mask, cache, **kwargs)
        assert self._on is not None
        on, self._on = self._on, None
        return heads * on[..., None].to(heads.dtype), weights

    @property
    def what(self) -> str:
        return f"{super().what}, {self.shared} + {self.routed} on"
