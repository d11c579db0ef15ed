"""Where the attention of a Hugging Face model is, in the same words for all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.convert.report import Cost

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert", "electra", "roberta", "xlm-roberta")
DIFFERENTIAL = ("diffllama",)


@dataclass(frozen=True, eq=False)
class Site:
    """A self-attention module as transformers made it, with its projections.

    name   of the module in the model; `parent` holds it as the last part of that name
    layer  its number
    rotary whether queries and keys are turned by the rotary embedding (channel j with j + d / 2)
    """

    name: str
    layer: int
    parent: nn.Module
    module: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    head_dim: int
    rotary: bool

    @property
    def heads(self) -> int:
        return self.query.out_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.key.out_features // self.head_dim

    def cost(self, context: int) -> Cost:
        """Of the module as it is."""
        linears = (self.query, self.key, self.value, self.out)
        own = {id(p): p for m in (self.module, self.out) for p in m.parameters()}
        products = 4 if hasattr(self.module, "lambda_q1") else 2  # DiffLlama weighs two halves of the values
        cached = self.key.out_features + self.value.out_features
        return Cost(
            f"{self.heads} heads"
            if self.kv_heads == self.heads
            else f"{self.heads} heads, {self.kv_heads} KV",
            sum(p.numel() for p in own.values()),
            cached * self.key.weight.element_size() if self.module.is_causal else 0,
            sum(linear.weight.numel() for linear in linears) + products * context * self.query.out_features,
        )


def find_sites(model: PreTrainedModel, families: Sequence[str] = ROTARY + ENCODERS) -> list[Site]:
    """All self-attention modules of a model that are as transformers made them, in order.

    Raises ValueError if the model is no transformers model of one of the families (by its model_type).
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}, must be a transformers PreTrainedModel")
    if model.config.model_type not in families:
        raise ValueError(
            f"model is of type {model.config.model_type!r}, must be one of {', '.join(families)}"
        )
    sites = []
    for name, parent in model.named_modules():
        attention: Any = getattr(parent, "self_attn", None)
        if isinstance(getattr(attention, "q_proj", None), nn.Linear) and _own(attention):
            a = attention
            projections = (a.q_proj, a.k_proj, a.v_proj, a.o_proj)
            sites.append(Site(f"{name}.self_attn", a.layer_idx, parent, a, *projections, a.head_dim, True))
        attention = getattr(parent, "self", None)
        if _own(attention) and not getattr(parent, "is_cross_attention", True):
            a, out = attention, parent.output.dense  # type: ignore[union-attr]
            projections = (a.query, a.key, a.value, out)  # type: ignore[assignment]
            sites.append(
                Site(f"{name}.self", a.layer_idx, parent, a, *projections, a.attention_head_size, False)
            )
    return sites


def _own(module: Any) -> bool:
    return isinstance(module, nn.Module) and type(module).__module__.startswith("transformers.")


def choose_sites(
    model: PreTrainedModel, layers: Sequence[int] | None, families: Sequence[str] = ROTARY + ENCODERS
) -> list[Site]:
    """The sites of some layers, or of all that are not converted yet.

    Raises ValueError if there are none, or a layer is not there or was converted before.
    """
    sites = {site.layer: site for site in find_sites(model, families)}
    if not sites:
        raise ValueError("model has no attention left that is as transformers made it: all is converted")
    if layers is None:
        return list(sites.values())
    for layer in layers:
        if layer not in sites:
            raise ValueError(f"layers names {layer}, must name some of {sorted(sites)}, not yet converted")
    return [sites[layer] for layer in sorted(set(layers))]


def by_head(rows: Float[Tensor, "hd *c"], head_dim: int) -> Float[Tensor, "h d *c"]:
    """The rows of a projection (or its bias), head by head."""
    return rows.unflatten(0, (-1, head_dim))


def linear_of(
    weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None, *, like: nn.Linear
) -> nn.Linear:
    """A layer with these numbers, in the dtype, and trained or frozen as another."""
    made = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=like.weight.dtype
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(like.weight.requires_grad)
