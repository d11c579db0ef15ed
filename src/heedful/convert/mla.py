"""Multi-head or grouped-query attention made multi-head latent attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from heedful.checks import check_choice, check_divides, check_positive
from heedful.convert.attention import ConvertedAttention, empty_linear
from heedful.convert.mla_init import mla_from_attention
from heedful.convert.model import convert
from heedful.convert.report import Report
from heedful.convert.sites import Site, by_head, choose_sites
from heedful.ops.rotary import rotate
from heedful.registry import register

ROTARIES = ("published", "fastest")


@register("to-mla", kind="convert", paper="x-ecomla", tags=("heads", "low-rank", "latent", "surgery"))
def to_mla(
    model: PreTrainedModel,
    *,
    kv_rank: int | None = None,
    kv_energy: float | None = None,
    query_rank: int | None = None,
    query_energy: float | None = None,
    nope_dim: int | None = None,
    rope_dim: int | None = None,
    rotary: str = "published",
    multiple: int = 8,
    layers: Sequence[int] | None = None,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model whose keys and values come from one latent a token, by singular values of its own weights.

        W_qb W_qa ~ W_q,  W_kvb W_kva ~ [W_k; W_v];  the cache holds W_kva x and one rotary key for all heads

    model        of the Llama kind without norms of queries and keys (llama, mistral, qwen2) or the BERT kind
    kv_rank      channels of the latent, or
    kv_energy    the share of squared singular values that decides it in each layer (`truncated_svd`)
    query_rank, query_energy   the same for queries; neither: an energy of 0.99
    rope_dim     channels of a head that are turned; None: half of them, or none in a model without rotary
                 embedding. It divides the width of a head
    nope_dim     channels of a head that are not; None: the rest
    rotary       "published": the last rope_dim channels, in pairs of neighbours, with frequencies spread over
                 all there were; "fastest": the pairs that the model turns fastest, as it turns them. Ours
    multiple     ranks are rounded up to it
    layers       numbers of the layers to convert; None: all
    copy         False changes the model itself
    context      tokens that a token sees in the report's multiply-adds

    What the model turned and is not turned any more, and the one key in the place of many, make the result a
    start for `recover`. Nothing changes with full ranks where no position is lost: in BERT, and with
    rotary="fastest", rope_dim the width of a head, nope_dim 0 and one KV head.
    Raises ValueError for another model, and for ranks and dims that do not fit.
    Source: X-EcoMLA, arXiv 2503.11132.
    """
    check_choice("rotary", rotary, ROTARIES)
    if (kv_rank is None) == (kv_energy is None):
        raise ValueError(f"kv_rank is {kv_rank} and kv_energy is {kv_energy}, exactly one must be given")
    for name, rank in (("kv_rank", kv_rank), ("query_rank", query_rank)):
        if rank is not None:
            check_positive(name, rank)
    if query_rank is None and query_energy is None:
        query_energy = 0.99
    sites = choose_sites(model, layers)
    for site in sites:
        if getattr(site.module, "k_norm", None) is not None:
            raise ValueError(
                f"model is of type {model.config.model_type!r}, which normalises keys, must be one without"
            )
    d, turns = sites[0].head_dim, sites[0].rotary
    rope_dim = (d // 2 if turns else 0) if rope_dim is None else rope_dim
    nope_dim = d - rope_dim if nope_dim is None else nope_dim
    if turns and rope_dim:
        check_divides("rope_dim", rope_dim, "the width of a head", d)
    if rope_dim % 2 or (rope_dim and not turns):
        wanted = "an even number" if turns else "0, since the model has no rotary embedding"
        raise ValueError(f"rope_dim is {rope_dim}, must be {wanted}")

    def make(site: Site) -> LatentAttention:
        order = channel_order(d, rope_dim, rotary).to(site.query.weight.device)
        wide = torch.promote_types(site.query.weight.dtype, torch.float32)

        def ordered(rows: Tensor) -> Tensor:
            return by_head(rows, d)[:, order].flatten(0, 1).to(wide)

        state = mla_from_attention(
            ordered(site.query.weight),
            ordered(site.key.weight),
            site.value.weight.to(wide),
            site.out.weight,
            heads=site.heads,
            kv_heads=site.kv_heads,
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            query_rank=query_rank,
            kv_rank=kv_rank,
            query_energy=query_energy,
            kv_energy=kv_energy,
            multiple=multiple,
        )
        new = LatentAttention(
            site,
            query_rank=len(state["query_down.weight"]),
            kv_rank=state["kv_up.weight"].shape[1],
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            rotary=rotary,
        )
        for name, linear in (
            ("query_down", new.q_a_proj),
            ("query_up", new.q_b_proj),
            ("kv_down", new.kv_a_proj),
            ("kv_up", new.kv_b_proj),
            ("out", new.o_proj),
        ):
            linear.weight.copy_(state[f"{name}.weight"])
        _fill_biases(new, site, order)
        return new

    what = "latents of rank " + (f"{kv_rank}" if kv_energy is None else f"for an energy of {kv_energy}")
    return convert(model, what, make, layers=layers, copy=copy, context=context)


def channel_order(head_dim: int, rope_dim: int, rotary: str) -> Int[Tensor, " d"]:
    """The channels of a head in the order in which the last `rope_dim` are turned, neighbours together."""
    if rotary == "published":
        return torch.arange(head_dim)
    pairs = torch.arange(head_dim).view(2, -1).T  # channel j is turned with j + d / 2, the first ones fastest
    return torch.cat([pairs[rope_dim // 2 :].T.flatten(), pairs[: rope_dim // 2].flatten()])


class LatentAttention(ConvertedAttention):
    """Multi-head latent attention in a Hugging Face model; see the mixer `MultiHeadLatentAttention`.

    What the model's cache holds as keys are the latents (b, 1, m, kv_rank), as values the rotary keys
    (b, 1, m, rope_dim). A pass without earlier tokens makes keys and values of every head; one that
    continues a text reads the latents alone.
    """

    kind = "latent"

    def __init__(
        self, site: Site, *, query_rank: int, kv_rank: int, nope_dim: int, rope_dim: int, rotary: str
    ) -> None:
        super().__init__(
            site, query_rank=query_rank, kv_rank=kv_rank, nope_dim=nope_dim, rope_dim=rope_dim, rotary=rotary
        )
        self.heads, self.kv_rank, self.nope_dim, self.rope_dim = site.heads, kv_rank, nope_dim, rope_dim
        self.pairs = rotary
        self.scaling = site.module.scaling * (site.head_dim / (nope_dim + rope_dim)) ** 0.5
        dim, width = site.query.in_features, site.heads * (nope_dim + rope_dim)
        keyed = site.key.bias is not None and rope_dim > 0
        self.q_a_proj = empty_linear(dim, query_rank, site.query, bias=False)
        self.q_b_proj = empty_linear(query_rank, width, site.query)
        self.kv_a_proj = empty_linear(dim, kv_rank + rope_dim, site.key, bias=keyed)
        self.kv_b_proj = empty_linear(
            kv_rank, site.heads * (nope_dim + self.head_dim), site.value, bias=False
        )
        biased = site.out.bias is not None or site.value.bias is not None
        self.o_proj = empty_linear(site.heads * self.head_dim, dim, site.out, bias=biased)

    def heads_of(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        query = rearrange(self.q_b_proj(self.q_a_proj(x)), "b n (h d) -> b h n d", h=self.heads)
        latent, key = self.kv_a_proj(x)[:, None].split([self.kv_rank, self.rope_dim], dim=-1)
        if self.rope_dim:
            assert angles is not None
            turn = self.angles_of(*angles)
            plain, turned = query.split([self.nope_dim, self.rope_dim], dim=-1)
            query = torch.cat([plain, rotate(turned, turn, pairing="interleaved")], dim=-1)
            key = rotate(key, turn, pairing="interleaved")
        if cache is not None:
            latent, key = cache.update(latent, key, self.layer_idx)
        form = self.expanded if latent.shape[2] == x.shape[1] else self.absorbed
        return form(query, latent, key, mask, **kwargs)

    def angles_of(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the model's angles by which the rope_dim channels are turned."""
        count, there = self.rope_dim // 2, self.head_dim // 2
        step = there // count if self.pairs == "published" else 1
        return cos[..., : count * step : step], sin[..., : count * step : step]

    def expanded(
        self, query: Tensor, latent: Tensor, shared: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        """With keys and values of every head."""
        both = rearrange(self.kv_b_proj(latent[:, 0]), "b m (h d) -> b h m d", h=self.heads)
        key, value = both.split([self.nope_dim, self.head_dim], dim=-1)
        key = torch.cat([key, shared.expand(-1, self.heads, -1, -1)], dim=-1)
        return self.attend(query, key, value, mask, **kwargs)

    def absorbed(
        self, query: Tensor, latent: Tensor, shared: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        """The same, with the latents as keys and values of all heads."""
        up = rearrange(self.kv_b_proj.weight, "(h d) r -> h d r", h=self.heads)
        key_up, value_up = up.split([self.nope_dim, self.head_dim], dim=1)
        plain, turned = query.split([self.nope_dim, self.rope_dim], dim=-1)
        query = torch.cat([torch.einsum("bhnd,hdr->bhnr", plain, key_up), turned], dim=-1)
        key = torch.cat([latent, shared], dim=-1).expand(-1, self.heads, -1, -1)
        value = latent.expand(-1, self.heads, -1, -1)
        weighed, weights = self.attend(query, key, value, mask, **kwargs)
        return torch.einsum("bnhr,her->bnhe", weighed, value_up), weights

    @property
    def what(self) -> str:
        return f"{self.heads} heads, latent {self.kv_rank} + {self.rope_dim}"

    @property
    def cached_numbers(self) -> int:
        return self.kv_rank + self.rope_dim

    def multiply_adds(self, context: int) -> int:
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        each = self.nope_dim + self.rope_dim + self.head_dim  # channels of a key and a value
        if self.is_causal:  # decoding, absorbed
            each = 2 * self.kv_rank + self.rope_dim
        return sum(linear.weight.numel() for linear in linears) + context * self.heads * each


def _fill_biases(new: LatentAttention, site: Site, order: Tensor) -> None:
    """Queries keep their biases. A key's bias without position adds one number to all logits of a query, and
    has no effect; a value's bias comes through the softmax as it is, and goes into the output's."""
    d = site.head_dim
    if site.query.bias is not None:
        rows = by_head(site.query.bias, d)[:, order]
        kept = torch.cat([rows[:, : new.nope_dim], rows[:, d - new.rope_dim :]], dim=1)
        new.q_b_proj.bias.copy_(kept.flatten())
    if new.kv_a_proj.bias is not None:
        new.kv_a_proj.bias.zero_()
        shared = by_head(site.key.bias, d)[:, order][:, d - new.rope_dim :].mean(0)
        new.kv_a_proj.bias[new.kv_rank :] = shared
    if new.o_proj.bias is not None:
        bias: Tensor = torch.zeros_like(new.o_proj.bias) if site.out.bias is None else site.out.bias
        if site.value.bias is not None:
            repeated = by_head(site.value.bias, d).repeat_interleave(site.heads // site.kv_heads, dim=0)
            bias = bias + site.out.weight @ repeated.flatten()
        new.o_proj.bias.copy_(bias)
