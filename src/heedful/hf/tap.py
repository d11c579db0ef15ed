"""Seeing and changing the attention calls of a pretrained model, for as long as a context lasts.

    class Halve(Handler):
        def weights(self, site, weights):
            return weights / 2

    with tap(model, Halve()):
        model(ids)

It goes through transformers' AttentionInterface: no module is patched, and the model's own attention
implementation is back when the context ends, also after an exception. Several taps on one model act in the
order they were entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from heedful.hf.attention import Visible, visibility, visible_mask
from heedful.inspect.site import Site, crosses, layer_of
from heedful.ops.attention import attention

NAME = "heedful-tap"


class Handler:
    """What a tap calls at every attention call of the model; each method is an identity unless overridden.

    A handler that overrides `logits` or `weights` makes its calls dense, with tables of n x m; one that
    overrides `see` or `output` alone leaves them to heedful's kernels.
    """

    def wants(self, site: Site) -> bool:
        """Whether this call is of interest."""
        return True

    def see(self, site: Site) -> None:
        """Look at the call before it is computed."""

    def logits(self, site: Site, logits: Float[Tensor, "b hq n m"]) -> Float[Tensor, "b hq n m"]:
        """Change the logits; -inf where the model hides a key."""
        return logits

    def weights(self, site: Site, weights: Float[Tensor, "b hq n m"]) -> Float[Tensor, "b hq n m"]:
        """Change the attention weights; rows need not sum to 1."""
        return weights

    def output(self, site: Site, output: Float[Tensor, "b hq n e"]) -> Float[Tensor, "b hq n e"]:
        """Change what the heads put out, before the output projection."""
        return output


@dataclass
class _Tapped:
    """A model under tap: its handlers in order, the names of its modules, and what to put back."""

    handlers: list[Handler]
    names: WeakKeyDictionary[nn.Module, str]
    before: list[tuple[Any, str | None]]  # configurations with their attention implementation


_tapped: WeakKeyDictionary[nn.Module, _Tapped] = WeakKeyDictionary()
_root: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


@contextmanager
def tap(model: PreTrainedModel, *handlers: Handler) -> Iterator[None]:
    """Let `handlers` see and change every attention call of `model` inside this context.

    Raises ValueError if `model` is no transformers model, or one whose attention cannot be chosen.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}, must be a transformers PreTrainedModel")
    root = _root.get(model, model)  # a part of a model under tap belongs to that tap
    tapped = _tapped.get(root) or _open(root)
    tapped.handlers.extend(handlers)
    try:
        yield
    finally:
        for handler in handlers:  # by identity: equal handlers may be entered twice
            del tapped.handlers[[h is handler for h in tapped.handlers].index(True)]
        if not tapped.handlers:
            _close(root, tapped)


@contextmanager
def alone(model: PreTrainedModel, *handlers: Handler) -> Iterator[None]:
    """Inside this context only `handlers` act on a model under tap: for forwards beside the main one."""
    tapped = _tapped[_root[model]]
    before, tapped.handlers = tapped.handlers, list(handlers)
    try:
        yield
    finally:
        tapped.handlers = before


def acts(model: PreTrainedModel, handler: Handler) -> bool:
    """Whether a handler acts on a model now: not if others are `alone` with it."""
    return any(h is handler for h in _tapped[_root[model]].handlers)


def _open(root: PreTrainedModel) -> _Tapped:
    configs = {id(m.config): m.config for m in root.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    refused = [
        type(m).__name__
        for m in root.modules()
        if isinstance(m, PreTrainedModel) and not m._can_set_attn_implementation()
    ]
    if refused:
        raise ValueError(
            f"model is a {type(root).__name__} with {', '.join(sorted(set(refused)))}, "
            "which does not go through transformers' AttentionInterface; it must, to be tapped"
        )
    tapped = _Tapped([], WeakKeyDictionary(), before)
    for name, module in root.named_modules():
        tapped.names[module] = name
        _root[module] = root
    _tapped[root] = tapped
    root.set_attn_implementation(NAME)
    return tapped


def _close(root: nn.Module, tapped: _Tapped) -> None:
    for config, implementation in tapped.before:
        config._attn_implementation_internal = (
            implementation  # the setter would reach into other configurations
        )
    for module in root.modules():
        _root.pop(module, None)
    del _tapped[root]


def _forward(
    module: nn.Module,
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    value: Float[Tensor, "b hkv m e"],
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Float[Tensor, " hq"] | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b n hq e"], Tensor | None]:
    """The attention function (the interface is transformers' AttentionInterface)."""
    tapped = _tapped[_root[module]]
    name = tapped.names[module]
    told = visibility(module, query, key, attention_mask, is_causal, position_bias, scaling, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    site = Site(
        module,
        name,
        layer_of(module, name),
        crosses(module, name),
        query,
        key,
        value,
        scale,
        told,
        softcap,
        s_aux,
    )
    handlers = [h for h in tapped.handlers if h.wants(site)]
    for handler in handlers:
        handler.see(site)
    changes = [
        h for h in handlers if type(h).logits is not Handler.logits or type(h).weights is not Handler.weights
    ]
    if changes or softcap is not None:
        logits = site.logits()
        for handler in changes:
            logits = handler.logits(site, logits)
        weights = site.softmax(logits)
        for handler in changes:
            weights = handler.weights(site, weights)
        output = site.mix(nn.functional.dropout(weights, dropout))
    else:
        output = attention(query, key, value, **told, scale=scale, sink_logits=s_aux, dropout_p=dropout)
    for handler in handlers:
        output = handler.output(site, output)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, visible_mask)
