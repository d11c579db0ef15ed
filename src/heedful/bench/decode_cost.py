"""What a decoded token costs: bytes of cache, FLOPs and dollars from a model's shape and a device's price.

    attention = max(FLOPs_attention U_flop, bytes_kv U_byte) + FLOPs_linear U_flop
    FFN       = FLOPs_ffn U_flop
    U_flop    = price per second / peak FLOP/s,  U_byte = price per second / bytes/s

Attention and FFN may run on devices of different kinds. The cache is in FP8, a byte a number; a multiply-add
is two FLOPs; norms, router, embedding and logits are not counted, nor is any time between devices.
Source: Step-3, arXiv 2507.19427.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from heedful.checks import check_choice, check_positive
from heedful.registry import register


@dataclass(frozen=True)
class Device:
    """dollars: an hour; bf16, fp8: peak FLOP/s, None where there is none; bandwidth: of memory, bytes/s."""

    name: str
    dollars: float
    bf16: float
    fp8: float | None
    bandwidth: float

    @property
    def flops(self) -> float:
        """Peak FLOP/s in the narrowest format that the device has."""
        return self.bf16 if self.fp8 is None else self.fp8

    @property
    def per_flop(self) -> float:
        """U_flop, dollars."""
        return self.dollars / 3600 / self.flops

    @property
    def per_byte(self) -> float:
        """U_byte, dollars."""
        return self.dollars / 3600 / self.bandwidth


DEVICES = (
    Device("H800", 2.0, 9.89e14, 1.98e15, 3.35e12),
    Device("H20", 0.8, 1.48e14, 2.96e14, 4.0e12),
    Device("A800", 0.75, 3.12e14, None, 2.0e12),
    Device("Ascend 910B", 0.67, 2.8e14, None, 1.6e12),
)


@dataclass(frozen=True)
class GroupedQuery:
    """Attention whose heads share `kv_heads` keys and values."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kept(self) -> int:
        """Numbers in the cache, a token and layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def per_key(self) -> int:
        """FLOPs of a query with one key and value: two products, all heads."""
        return 4 * self.heads * self.head_dim

    def weights(self, dim: int) -> int:
        """Parameters of the projections of a layer, biases and norms left out."""
        return 2 * dim * self.heads * self.head_dim + 2 * dim * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Factorized:
    """Multi-matrix factorization: one key and value for all heads, queries of rank `query_rank`."""

    heads: int
    head_dim: int
    query_rank: int

    @property
    def kept(self) -> int:
        """Numbers in the cache, a token and layer."""
        return 2 * self.head_dim

    @property
    def per_key(self) -> int:
        """FLOPs of a query with one key and value: two products, all heads."""
        return 4 * self.heads * self.head_dim

    def weights(self, dim: int) -> int:
        """Parameters of the projections of a layer, the norm left out."""
        wide = self.heads * self.head_dim
        return dim * self.query_rank + 2 * dim * self.head_dim + self.query_rank * wide + wide * dim


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention, decoded in its absorbed form.

    Both products are counted over all kept numbers, as the paper counts them, though the values are without
    the rotary part and the second product is by so much smaller.
    """

    heads: int
    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def kept(self) -> int:
        """Numbers in the cache, a token and layer."""
        return self.kv_rank + self.rope_dim

    @property
    def per_key(self) -> int:
        """FLOPs of a query with one latent: two products, all heads."""
        return 4 * self.heads * self.kept

    def weights(self, dim: int) -> int:
        """Parameters of the projections of a layer, norms left out."""
        query = dim * self.query_rank + self.query_rank * self.heads * (self.nope_dim + self.rope_dim)
        pair = dim * self.kept + self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return query + pair + self.heads * self.value_dim * dim


@dataclass(frozen=True)
class Load:
    """A decoded token, all layers: kv_bytes read, FLOPs of attention, of its projections, of the FFN."""

    kv_bytes: float
    attention: float
    linear: float
    ffn: float

    @property
    def intensity(self) -> float:
        """FLOPs of attention a byte of cache."""
        return self.attention / self.kv_bytes


@dataclass(frozen=True)
class Model:
    """A decoder whose layers all have the same attention.

    dim, layers  channels, layers
    attention    its design
    ffn          inner widths that a token goes through, summed over the layers: experts chosen and shared
    """

    name: str
    dim: int
    layers: int
    attention: GroupedQuery | Factorized | Latent
    ffn: int

    def load(self, context: int) -> Load:
        """A token that sees `context` tokens; three matrices in each FFN, cache and keys as said above."""
        check_positive("context", context)
        return Load(
            kv_bytes=self.layers * context * self.attention.kept,
            attention=self.layers * context * self.attention.per_key,
            linear=2 * self.layers * self.attention.weights(self.dim),
            ffn=2 * 3 * self.dim * self.ffn,
        )


@dataclass(frozen=True)
class Told:
    """A model of which the paper's figures are taken, and not worked out: they hold at `context` tokens."""

    name: str
    context: int
    figures: Load

    def load(self, context: int) -> Load:
        """The figures; ValueError at another context."""
        if context != self.context:
            raise ValueError(f"context is {context}, must be {self.context} for {self.name!r}, as published")
        return self.figures


# Shapes of the released configurations; that they give the paper's figures is tested.
MODELS: tuple[Model | Told, ...] = (
    Model("Step-3", 7168, 61, Factorized(64, 256, 2048), 5 * 18432 + 56 * (3 + 1) * 5120),
    Model("DeepSeek-V3", 7168, 61, Latent(128, 1536, 512, 128, 64, 128), 3 * 18432 + 58 * (8 + 1) * 2048),
    Model("Kimi K2", 7168, 61, Latent(64, 1536, 512, 128, 64, 128), 18432 + 60 * (8 + 1) * 2048),
    Model("Qwen3-235B", 4096, 94, GroupedQuery(64, 4, 128), 94 * 8 * 1536),
    Model("Qwen3-32B", 5120, 64, GroupedQuery(64, 8, 128), 64 * 25600),
    Model("ERNIE-4.5", 8192, 54, GroupedQuery(64, 8, 128), 3 * 28672 + 51 * 8 * 3584),
    Model("Pangu Pro", 5120, 48, GroupedQuery(40, 8, 128), 48 * (8 + 4) * 1344),
    # The published cache is a quarter above what 8 heads of 128 give, its other figures are as they would be.
    Told("Llama4-Maverick", 8192, Load(1.01e9, 8.05e9, 6.04e9, 2.42e10)),
    # Seven layers of eight are linear attention.
    Told("MiniMax-M1", 8192, Load(9.23e8, 3.42e9, 3.75e10, 5.44e10)),
)


@dataclass(frozen=True)
class Cost:
    """Dollars for 1M decoded tokens, and the devices they were worked out for."""

    model: str
    context: int
    load: Load
    attention_device: str
    ffn_device: str
    attention: float
    ffn: float

    @property
    def total(self) -> float:
        """Attention and FFN."""
        return self.attention + self.ffn

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "intensity": self.load.intensity, "total": self.total}


@register("decode-cost", kind="bench", paper="step3-mfa", tags=("decoding", "cost"))
def decode_cost(model: Model | Told, context: int, attention_on: Device, ffn_on: Device) -> Cost:
    """What 1M tokens cost that see `context` tokens each, by the formulas at the top of this file.

    attention_on, ffn_on  the devices, always at their peak. ValueError on a context below 1, or one for which
    the model has no figures. Source: Step-3, arXiv 2507.19427.
    """
    load = model.load(context)
    core = max(load.attention * attention_on.per_flop, load.kv_bytes * attention_on.per_byte)
    attention = core + load.linear * attention_on.per_flop
    ffn = load.ffn * ffn_on.per_flop
    return Cost(model.name, context, load, attention_on.name, ffn_on.name, 1e6 * attention, 1e6 * ffn)


def cheapest(model: Model | Told, context: int) -> Cost:
    """`decode_cost` on the devices of DEVICES that make it least: one for attention, one for the FFN."""
    pairs = ((a, f) for a in DEVICES for f in DEVICES)
    return min((decode_cost(model, context, *pair) for pair in pairs), key=lambda cost: cost.total)


def costs(names: list[str], contexts: list[int]) -> list[Cost]:
    """`cheapest` of each model at each context for which there are figures; ValueError on unknown names."""
    by_name = {model.name: model for model in MODELS}
    for name in names:
        check_choice("models", name, [*by_name])
    return [
        cheapest(model, context)
        for context in contexts
        for model in (by_name[name] for name in names)
        if not isinstance(model, Told) or model.context == context
    ]
