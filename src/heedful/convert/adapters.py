"""p-Laplacian adapters put into a frozen model with post-norm layers."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from heedful.checks import check_positive
from heedful.convert.report import Change, Cost, Report
from heedful.convert.sites import ENCODERS
from heedful.mixers.heads.p_adapter import FFNAdapter, PAdapterAttention
from heedful.patterns.causal import Causal
from heedful.registry import register

KEY = "heedful_p_adapters"  # in the model's configuration
FAMILIES = (*ENCODERS, "blip", "blip_text_model")


@register("add-p-adapters", kind="convert", paper="p-adapter", tags=("adapter", "graph", "surgery"))
def add_p_adapters(
    model: PreTrainedModel,
    *,
    reduction: int = 8,
    p_self: float = 1.75,
    p_cross: float = 1.75,
    learnable_p: bool = True,
    mu: float = 0.1,
    samples: int = 24,
    ffn: bool = True,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model frozen but for new adapters after every attention, and beside every feed-forward net.

        y = LN(x + adapter(z; A, nodes)),  z = W_out concat_h(A_h v_h)       see `PAdapterAttention`
        y = LN(FFN(r) + r + W_2 relu(W_1 r))

    model        with post-norm layers: bert, electra, roberta, xlm-roberta, encoder or decoder, or BLIP (the
                 whole, whose text layers are adapted, or one of its text models)
    reduction    adapters are dim / reduction wide
    p_self, p_cross  of the Laplacian after self and after cross attention; learnable_p: their starts
    mu           mu0; the learned mu lies between mu0 and 3 mu0
    samples      places to which the keys of cross attention are averaged
    ffn          adapters beside the feed-forward nets, too
    copy         False changes the model itself
    context      tokens that a token sees in the report's multiply-adds, in cross attention as well

    The defaults are the authors' for captions; they train with a rate of 3e-4. Adapters start at random, so
    that the model is a little changed at first. Attention becomes "eager", whose weights the adapters need;
    a decoder's cache stays what it was, and nodes are made anew from its values in each step.
    `heedful.convert.load` reads what `save_pretrained` wrote. The rows of the report are whole layers.
    Raises ValueError for another model, one that has adapters, and widths that do not divide.
    Source: p-Laplacian adaptation, arXiv 2312.10613.
    """
    check_positive("context", context)
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in FAMILIES:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"model is of type {kind!r}, must be one of {', '.join(FAMILIES)}")
    if getattr(model.config, KEY, None):
        raise ValueError("model has adapters, must have none")
    numbers: dict[str, Any] = {
        "reduction": reduction,
        "p_self": p_self,
        "p_cross": p_cross,
        "learnable_p": learnable_p,
        "mu": mu,
        "samples": samples,
        "ffn": ffn,
    }
    changed = copying.deepcopy(model) if copy else model
    whole = sum(p.numel() for p in changed.parameters())
    before = {name: _cost(layer, context) for name, layer in _layers(changed).items()}
    insert(changed, numbers)  # an error leaves the model as it was
    freeze_others(changed)
    changes = tuple(Change(n, before[n], _cost(layer, context)) for n, layer in _layers(changed).items())
    after = sum(p.numel() for p in changed.parameters())
    return changed, Report(f"p-adapters, a bottleneck of 1 / {reduction}", changes, (whole, after), context)


def insert(model: PreTrainedModel, numbers: dict[str, Any]) -> None:
    """Adapters with the numbers of a configuration, to be filled."""
    _put(model, _make(model, numbers), numbers)


def freeze_others(model: PreTrainedModel) -> None:
    """Let nothing train but the adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name)


class AdaptedAttention(nn.Module):
    """Attention of a layer with what follows it, as transformers calls it; weights and nodes are its own."""

    def __init__(self, old: Any, *, cross: bool, layer: int | None, **adapter: Any) -> None:
        super().__init__()
        like = old.output.dense.weight
        self.cross, self.layer_idx, self.decodes = cross, layer, old.self.config.is_decoder
        self.is_causal = getattr(old.self, "is_causal", False)  # BLIP gives a mask instead
        self.block = PAdapterAttention(
            like.shape[0], heads=old.self.num_attention_heads, **adapter, device=like.device, dtype=like.dtype
        )
        self.block.query, self.block.key, self.block.value = old.self.query, old.self.key, old.self.value
        self.block.output.dense, self.block.output.norm = old.output.dense, old.output.LayerNorm
        self.block.dropout, self.block.output.dropout = old.self.dropout, old.output.dropout
        self.train(old.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "b n c"],
        attention_mask: Any = None,
        encoder_hidden_states: Float[Tensor, "b m e"] | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,  # its name since transformers 5.24
        **_: Any,
    ) -> tuple[Float[Tensor, "b n c"], None]:
        block = self.block
        layer: Any = self.layer_idx  # None where nothing is cached
        mask = attention_mask
        if self.cross and encoder_attention_mask is not None:
            mask = encoder_attention_mask
        cache, held = past_key_values if cache is None else cache, False
        if isinstance(cache, EncoderDecoderCache):
            held = self.cross and bool(cache.is_updated.get(layer))
            if self.cross:
                cache.is_updated[layer] = True
            cache = cache.cross_attention_cache if self.cross else cache.self_attention_cache
        query = self._heads(block.query(hidden_states))
        if held:
            assert cache is not None
            known: Any = cache.layers[layer]
            key, value = known.keys, known.values
        else:
            source = encoder_hidden_states if self.cross else hidden_states
            key, value = self._heads(block.key(source)), self._heads(block.value(source))
            if cache is not None:
                key, value = cache.update(key, value, layer)
        visible = _visible(mask)
        if visible is None and self.is_causal and not self.cross:
            visible = Causal().mask(query.shape[2], key.shape[2], device=query.device)
        return block.attend(hidden_states, query, key, value, visible, own=not self.cross), None

    def _heads(self, projected: Tensor) -> Tensor:
        return rearrange(projected, "b n (h d) -> b h n d", h=self.block.heads)


class AdaptedFeedForward(nn.Module):
    """What follows the inner layer of a feed-forward net, with the adapter on the residual."""

    def __init__(self, old: Any, reduction: int) -> None:
        super().__init__()
        like = old.dense.weight
        self.dense, self.dropout, self.norm = old.dense, old.dropout, old.LayerNorm
        self.adapter = FFNAdapter(like.shape[0], reduction=reduction, device=like.device, dtype=like.dtype)
        self.train(old.training)

    def forward(
        self, hidden_states: Float[Tensor, "b n hidden"], input_tensor: Float[Tensor, "b n c"]
    ) -> Float[Tensor, "b n c"]:
        return self.norm(self.dropout(self.dense(hidden_states)) + self.adapter(input_tensor))


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """The post-norm layers: of BLIP those for text."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "intermediate") and hasattr(module, "attention") and hasattr(module, "output")
    }


def _make(model: PreTrainedModel, numbers: dict[str, Any]) -> dict[str, nn.Module]:
    """The new modules, by the names of those that they stand for."""
    shared = {name: numbers[name] for name in ("reduction", "learnable_p", "mu", "samples")}
    made: dict[str, nn.Module] = {}
    for name, layer in _layers(model).items():
        for part, p in (("attention", "p_self"), ("crossattention", "p_cross")):
            if hasattr(layer, part):
                old = getattr(layer, part)
                made[f"{name}.{part}"] = AdaptedAttention(
                    old, cross=part != "attention", layer=old.self.layer_idx, p=numbers[p], **shared
                )
        if numbers["ffn"]:
            made[f"{name}.output"] = AdaptedFeedForward(layer.output, numbers["reduction"])
    return made


def _put(model: PreTrainedModel, made: dict[str, nn.Module], numbers: dict[str, Any]) -> None:
    model.set_attn_implementation("eager")
    for name, module in made.items():
        model.set_submodule(name, module)
    setattr(model.config, KEY, numbers)


def _visible(mask: Any) -> Bool[Tensor, "b #h #n m"] | None:
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        return mask
    if isinstance(mask, Tensor) and mask.is_floating_point():
        return mask > -1
    raise ValueError('the attention implementation of a model with adapters must be "eager" or "sdpa"')


def _cost(layer: Any, context: int) -> Cost:
    """Of a token that is decoded, or in an encoder of any: keys and values of another sequence aside."""
    parts = [getattr(layer, name) for name in ("attention", "crossattention") if hasattr(layer, name)]
    products = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    for part in parts:
        own = part.block if isinstance(part, AdaptedAttention) else part.self
        products += 2 * context * own.query.out_features
        if part is not parts[0]:
            products -= own.key.weight.numel() + own.value.weight.numel()
        if isinstance(part, AdaptedAttention):
            products += _node_products(part, context)
    adapted = isinstance(parts[0], AdaptedAttention)
    first = parts[0].block if adapted else parts[0].self
    decodes = parts[0].decodes if adapted else first.config.is_decoder
    heads = parts[0].block.heads if adapted else first.num_attention_heads
    return Cost(
        f"{heads} heads" + (", cross" if len(parts) > 1 else "") + (", adapters" if adapted else ""),
        sum(p.numel() for p in layer.parameters()),
        2 * first.query.out_features * first.query.weight.element_size() if decodes else 0,
        products,
    )


def _node_products(part: AdaptedAttention, context: int) -> int:
    """What the graph takes beside the adapter's own layers, once through each of which is counted there."""
    output = part.block.output
    down = output.adapter.down.weight
    made = 1 + part.block.samples if part.cross else context if part.decodes else 1
    edges = part.block.samples if part.cross else context
    return made * (output.dense.weight.numel() + down.numel()) - down.numel() + edges * down.shape[0]
