"""What head designs cost at one width: bytes of cache, multiply-adds and parameters, all measured.

python -m heedful.bench.heads
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from heedful.mixers.heads.selective_multi_head_attention import SelectiveMultiHeadAttention
from heedful.mixers.mixer import Mixer
from heedful.models.count import parameters
from heedful.ops.observe import observe
from heedful.registry import create

DIM, HEADS, TOKENS = 512, 8, 1024
BYTES = 2  # of a bfloat16 number


@dataclass(frozen=True)
class Design:
    """A mixer by name, its arguments beside dim and heads, and the numbers it keeps a token, as a formula.

    formula  of the mixer's own attributes; None: it has no state
    """

    label: str
    name: str
    arguments: dict[str, Any]
    formula: str | None = "2 * kv_heads * head_dim"


MHA = "2 * heads * head_dim"
MLA = {"query_rank": 256, "kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_dim": 64}
DESIGNS = (
    Design("multi-head", "self-attention", {"causal": True}),
    Design("grouped-query, 2 KV heads", "self-attention", {"causal": True, "kv_heads": 2}),
    Design("multi-query", "self-attention", {"causal": True, "kv_heads": 1}),
    Design("sparse query, 4 query and 2 KV heads", "sqa", {"causal": True}),
    Design("gated, a number a channel", "gated-attention", {}),
    Design("gated, a number a head", "gated-attention", {"gate": "headwise"}),
    Design("differential, 4 signal and 4 noise heads", "grouped-differential-attention", {}),
    Design(
        "grouped differential, 6 signal and 2 noise heads",
        "grouped-differential-attention",
        {"noise_heads": 2},
    ),
    Design(
        "multi-matrix factorization, width 128, rank 256",
        "step3-mfa",
        {"head_dim": 128, "query_rank": 256},
        "2 * head_dim",
    ),
    Design("compressed convolutional, width 32, 8 KV heads", "cca", {"head_dim": 32, "kv_heads": 8}),
    Design("the same, 2 KV heads", "cca", {"head_dim": 32, "kv_heads": 2}),
    Design("relative convolutional, up to 2048 tokens", "rcmha", {"max_length": 2048}, MHA),
    Design(
        "latent, ranks 256 and 128, 32 rotary channels",
        "multi-head-latent-attention",
        MLA,
        "kv_rank + rope_dim",
    ),
    Design("mixture of heads, 4 shared, 2 of 4 routed", "moh", {"causal": True}, MHA),
    Design("the same without parameters, 2 KV heads", "moh-llama", {"kv_heads": 2}),
    Design(
        "decoupled heads, 2 key and 4 value heads",
        "dha",
        {"key_heads": 2, "value_heads": 4},
        "(key_heads + value_heads) * head_dim",
    ),
    Design("phantom, 2 KV heads", "phantom", {"kv_heads": 2}),
    Design(
        "selective, 4 of 8 heads a token",
        "selective-multi-head-attention",
        {},
        "2 * topk * head_dim + topk",  # the names of the heads are whole numbers of two bytes
    ),
    Design(
        "with a p-Laplacian adapter, 64 wide",
        "p-adapter",
        {"causal": True},
        "2 * dim + dim // reduction",
    ),
    Design("composite, a whole layer, a token of text", "ee-mllm", {"kv_heads": 2}),
    Design("modality experts, a whole layer, a token of text", "mono-internvl", {"kv_heads": 2}),
    Design("experts of an MLP, 2 of 4 a token, hidden 2048", "union-mlp", {}, "0"),
    Design("one head a token and an expander, hidden 2048", "shrp", {}, None),
    Design("Gaussian weights of features", "gaam", {}, None),
    Design("mixture of heads on a map of 32 x 32", "moh-vit", {}, None),
    Design("the same, windows and a pooled map", "moh-vit-aggregated", {"pool_ratio": 4}, None),
)


@dataclass(frozen=True)
class Row:
    """Bytes a token and bytes a sequence of the state, multiply-adds a token, parameters."""

    design: Design
    cache: int | None
    once: int | None
    multiply_adds: float
    parameters: int


def build(design: Design, dtype: torch.dtype) -> Mixer:
    """The mixer of a design, in eval mode."""
    heads = {} if design.name == "union-mlp" else {"heads": HEADS}
    return create(design.name, DIM, **heads, **design.arguments, dtype=dtype).eval()


@torch.no_grad()
def cache(design: Design, tokens: int = 16) -> tuple[int, int] | None:
    """Bytes of the state for one more token, and whatever of it does not grow; None without a state.

    Raises ValueError if a token takes other than what the design's formula says.
    """
    if design.formula is None:
        return None
    mixer = build(design, torch.bfloat16)
    _, before = mixer(torch.randn(1, tokens, DIM, dtype=torch.bfloat16), state=mixer.init_state(1))
    _, after = mixer(torch.randn(1, 1, DIM, dtype=torch.bfloat16), state=before)
    token = after.nbytes() - before.nbytes()
    sizes = {"topk": mixer.gate.topk} if isinstance(mixer, SelectiveMultiHeadAttention) else {}
    told = BYTES * eval(design.formula, sizes, vars(mixer))  # the formulas stand above
    if token != told:
        raise ValueError(f"the state of {design.label!r} grows by {token} bytes a token, must grow by {told}")
    return token, after.nbytes() - (tokens + 1) * token


@torch.no_grad()
def multiply_adds(design: Design) -> float:
    """Multiply-adds of a token that sees TOKENS tokens, itself among them.

    With a state: of decoding one token. Without: of a whole sequence or map, for each of its tokens. Products
    of matrices, convolutions and attention count; norms, activations and other work number by number do not.
    """
    mixer = build(design, torch.float32)
    side = math.isqrt(TOKENS)
    shape = (1, DIM, side, side) if mixer.entry.kind == "grid" else (1, TOKENS, DIM)
    x, more, tokens = torch.randn(shape), {}, TOKENS
    if design.formula is not None:
        _, state = mixer(x[:, :-1], state=mixer.init_state(1))
        x, more, tokens = x[:, -1:], {"state": state}, 1
    fused = 0

    def seen(*args: Any, **named: Any) -> int:
        nonlocal fused
        fused += 1
        return 0  # `observe` counts these, without what padding adds

    kernels = dict.fromkeys(
        (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            torch.ops.aten._scaled_dot_product_flash_attention,
            torch.ops.aten._scaled_dot_product_efficient_attention,
            torch.ops.aten._scaled_dot_product_cudnn_attention,
        ),
        seen,
    )
    counter = FlopCounterMode(display=False, custom_mapping=kernels)
    with counter, observe() as visits:
        mixer(x, **more)
    if fused != len(visits):
        raise RuntimeError(
            f"{len(visits)} attention calls of {design.label!r} made {fused} calls of fused kernels: "
            "products would be counted twice"
        )
    return (counter.get_total_flops() / 2 + sum(visit.products for visit in visits)) / tokens


def rows() -> Iterator[Row]:
    """All designs, measured one after the other."""
    for design in DESIGNS:
        torch.manual_seed(0)  # some designs route by the data
        kept = cache(design)
        token, once = (None, None) if kept is None else kept
        count = parameters(build(design, torch.float32))
        yield Row(design, token, once, multiply_adds(design), count)


def markdown(row: Row) -> str:
    """A line of the table."""
    formula = "-" if row.design.formula is None else f"`{row.design.formula}`"
    told = ["-" if n is None else f"{n:,}" for n in (row.cache, row.once)]
    work = f"{row.multiply_adds / 1e6:.2f} M"
    return (
        f"| {row.design.label} | `{row.design.name}` | {formula} | {told[0]} | {told[1]} | {work} "
        f"| {row.parameters:,} |"
    )


HEADER = (
    "| design | mixer | numbers a token | bytes a token | bytes once | multiply-adds | parameters |",
    "|---|---|---|---|---|---|---|",
)


if __name__ == "__main__":
    print("\n".join(HEADER))
    for row in rows():
        print(markdown(row), flush=True)
