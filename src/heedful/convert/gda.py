"""Differential attention grown by its signal heads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from heedful.checks import check_positive
from heedful.convert.attention import ConvertedAttention, empty_linear
from heedful.convert.model import convert
from heedful.convert.report import Report
from heedful.convert.sites import DIFFERENTIAL, Site, by_head
from heedful.mixers.heads.grouped_differential_attention import GroupedDifferentialAttention
from heedful.registry import register


@register(
    "grow-signal-heads",
    kind="convert",
    paper="grouped-differential-attention",
    tags=("heads", "differential", "surgery"),
)
def grow_signal_heads(
    model: PreTrainedModel,
    *,
    times: int,
    jitter: float = 0.0,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A DiffLlama with `times` as many signal heads in each layer; its noise heads stay as they are.

    Every signal head becomes `times` heads beside each other with the same queries, the columns of the output
    projection that read it are shared out among them, and each noise head serves `times` as many: the model
    computes what it did, with grouped differential attention of the ratio `times`.

    model    a transformers model of type diffllama
    jitter   standard deviation of noise on the new queries, as a share of that of the weights. At 0 the
             function is unchanged, and copies get the same gradients: training would never tell them apart
    copy     False changes the model itself
    context  tokens that a token sees in the report's multiply-adds

    Raises ValueError for another model and times below 1.
    Source: Grouped Differential Attention, arXiv 2510.06949; the rule of scaling is ours.
    """
    check_positive("times", times)
    if jitter < 0:
        raise ValueError(f"jitter is {jitter}, must be at least 0")

    def make(site: Site) -> GrownAttention:
        new = GrownAttention(site, times=times)
        d = site.head_dim
        query, out = grown(by_head(site.query.weight, d), site.out.weight, site.heads // 2, times, jitter)
        new.q_proj.weight.copy_(query.flatten(0, 1))
        new.o_proj.weight.copy_(out)
        if site.query.bias is not None:
            signal, noise = by_head(site.query.bias, d).chunk(2)
            new.q_proj.bias.copy_(torch.cat([signal.repeat_interleave(times, 0), noise]).flatten())
        if site.out.bias is not None:
            new.o_proj.bias.copy_(site.out.bias)
        return new

    what = f"{times} times the signal heads"
    return convert(model, what, make, layers=None, copy=copy, context=context, families=DIFFERENTIAL)


@torch.no_grad()
def grow_mixer(
    mixer: GroupedDifferentialAttention, *, times: int, jitter: float = 0.0
) -> GroupedDifferentialAttention:
    """A new mixer with `times` as many signal heads; as `grow_signal_heads`."""
    check_positive("times", times)
    d, noise = mixer.head_dim, mixer.noise_heads
    like = mixer.query.weight
    new = GroupedDifferentialAttention(
        mixer.dim,
        heads=noise * (mixer.ratio * times + 1),
        noise_heads=noise,
        kv_heads=mixer.kv_heads,
        head_dim=d,
        lambda_init=mixer.lambda_init,
        rotary_base=mixer.rotary_base,
        norm_eps=mixer.norm.eps or 0.0,
        causal=mixer.causal,
        qkv_bias=mixer.query.bias is not None,
        dropout=mixer.dropout,
        device=like.device,
        dtype=like.dtype,
    )
    state = mixer.state_dict()
    striped = by_head(like, d).unflatten(0, (noise, mixer.ratio + 1))
    halves = torch.cat([striped[:, :-1].flatten(0, 1), striped[:, -1]])
    query, state["out.weight"] = grown(halves, mixer.out.weight, noise * mixer.ratio, times, jitter)
    signal = query[:-noise].unflatten(0, (noise, -1))
    state["query.weight"] = torch.cat([signal, query[-noise:, None]], dim=1).flatten(0, 2)
    if mixer.query.bias is not None:
        rows = by_head(mixer.query.bias, d).unflatten(0, (noise, mixer.ratio + 1))
        signal = rows[:, :-1].repeat_interleave(times, 1)
        state["query.bias"] = torch.cat([signal, rows[:, -1:]], dim=1).flatten()
    new.load_state_dict(state)
    return new.train(mixer.training)


def grown(
    query: Float[Tensor, "h d c"], out: Float[Tensor, "c width"], signal: int, times: int, jitter: float
) -> tuple[Float[Tensor, "h2 d c"], Float[Tensor, "c width2"]]:
    """Queries with the first `signal` heads `times` over, and an output that shares them out."""
    copies = query[:signal].repeat_interleave(times, 0)
    if jitter:
        copies = copies + jitter * query.std() * torch.randn_like(copies)
    columns = out.unflatten(1, (signal, -1)).repeat_interleave(times, 1) / times
    return torch.cat([copies, query[signal:]]), columns.flatten(1)


class GrownAttention(ConvertedAttention):
    """Grouped differential attention in the place of DiffLlama's; see the mixer of that name.

    Rows of `q_proj` are the signal heads and then the noise heads; of the keys and of the values the first
    half are k1 and v1, the second k2 and v2.

    times  signal heads for each noise head
    """

    kind = "grouped-differential"

    def __init__(self, site: Site, *, times: int) -> None:
        super().__init__(site, times=times)
        old, dim = site.module, site.query.in_features
        self.times, self.noise_heads, self.kv_heads = times, site.heads // 2, site.kv_heads
        self.signal_heads = times * self.noise_heads
        self.q_proj = empty_linear(dim, (self.signal_heads + self.noise_heads) * self.head_dim, site.query)
        self.o_proj = empty_linear(2 * self.signal_heads * self.head_dim, dim, site.out)
        self.k_proj, self.v_proj = site.key, site.value
        self.lambda_q1, self.lambda_k1 = old.lambda_q1, old.lambda_k1
        self.lambda_q2, self.lambda_k2 = old.lambda_q2, old.lambda_k2
        self.lambda_init, self.groupnorm = old.lambda_init, old.groupnorm

    def heads_of(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b n h e"], Tensor | None]:
        assert angles is not None
        query, key, value = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        query, key = apply_rotary_pos_emb(query, key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        both = torch.cat(value.chunk(2, dim=1), dim=-1)
        signal, noise = query.split([self.signal_heads, self.noise_heads], dim=1)
        parts = []
        for q, k in zip((signal, noise), key.chunk(2, dim=1), strict=True):
            groups = q.shape[1] // k.shape[1]
            k, v = (y.repeat_interleave(groups, dim=1) for y in (k, both))
            parts.append(self.attend(q, k, v, mask, **kwargs)[0])
        o1, o2 = parts
        o = o1 - self.lambda_full().to(o1.dtype) * o2.repeat_interleave(self.times, dim=2)
        return (1 - self.lambda_init) * self.groupnorm(o), None

    def lambda_full(self) -> Tensor:
        """The factor of the noise."""
        first, second = (
            (q.float() * k.float()).sum().exp()
            for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        return first - second + self.lambda_init

    @property
    def what(self) -> str:
        return f"{self.signal_heads} signal, {self.noise_heads} noise heads, {self.kv_heads} KV"

    @property
    def cached_numbers(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    def multiply_adds(self, context: int) -> int:
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        heads = self.signal_heads + self.noise_heads
        return sum(linear.weight.numel() for linear in linears) + 3 * context * heads * self.head_dim
