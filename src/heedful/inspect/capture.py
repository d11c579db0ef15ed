"""Seeing the attention calls of any model: transformers, timm, torch's own modules, heedful's mixers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.inspect.calls import of_heedful, of_multihead, of_sdpa
from heedful.inspect.site import Site, Visibility, crosses, layer_of
from heedful.ops.call import Call
from heedful.ops.observe import watch
from heedful.registry import register

See = Callable[[Site], None]


@register("attention-capture", kind="inspect", paper="vit-visual-analytics", tags=("capture",))
@contextmanager
def capture(model: nn.Module, see: See) -> Iterator[None]:
    """Inside this context `see(site)` is called for each attention call of `model`, before it is computed.

        entropies = []
        with capture(model, lambda site: entropies.append(attention_entropy(site.weights()).mean((0, 2)))):
            model(x)

    A `Site` has the call's queries, keys and values, and gives weights, log-sum-exp and head outputs for the
    rows that are asked for. Nothing is kept from one call to the next, and the model computes what it would
    compute without.

    Seen are transformers models that go through its AttentionInterface (see `heedful.hf.tap`), and in other
    models `torch.nn.MultiheadAttention`, `heedful.attention` and PyTorch's scaled_dot_product_attention,
    which timm uses. Warns at the end if there was no call.
    Raises ValueError for a transformers model whose attention cannot be seen.
    """
    calls = 0

    def told(site: Site) -> None:
        nonlocal calls
        calls += 1
        see(site)

    with ExitStack() as stack:
        tapped = _tap(model, told, stack)
        if model not in tapped:
            stack.enter_context(_watched(model, told, tapped))
        yield
    if not calls:
        warnings.warn(
            f"no attention call of {type(model).__name__} was seen: it was not run, or makes none through "
            "transformers, torch.nn.MultiheadAttention, scaled_dot_product_attention or heedful.attention",
            stacklevel=3,
        )


def _tap(model: nn.Module, see: See, stack: ExitStack) -> list[nn.Module]:
    """Taps on the transformers models at or inside `model`, which are given back."""
    if "transformers" not in sys.modules:  # then no module can be of it
        return []
    from transformers import PreTrainedModel

    from heedful.hf.tap import Handler, tap

    class Show(Handler):
        def __init__(self, prefix: str) -> None:
            self.prefix = prefix

        def see(self, site: Site) -> None:
            site.name = self.prefix + site.name
            see(site)

    roots: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(root + ".") for root in roots)
        if isinstance(module, PreTrainedModel) and not inside:
            roots[name] = module
            stack.enter_context(tap(module, Show(name + "." if name else "")))
    return list(roots.values())


@dataclass
class _Place:
    """A module at work. heedful.attention may compute with PyTorch's; then that call is no other one."""

    module: nn.Module
    name: str
    of_heedful: bool = False

    @property
    def multihead(self) -> bool:
        """Whether its call was seen when it began."""
        return isinstance(self.module, nn.MultiheadAttention)


@contextmanager
def _watched(model: nn.Module, see: See, tapped: list[nn.Module]) -> Iterator[None]:
    """Hooks keep track of which module is at work; two watchers and a hook report its attention."""
    places: list[_Place] = [_Place(model, "")]
    told = {m for root in tapped for m in root.modules()}

    def show(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Visibility, **more: Any) -> None:
        here = places[-1]
        cross = more.pop("cross", crosses(here.module, here.name))
        layer = layer_of(here.module, here.name)
        see(Site(here.module, here.name, layer, cross, query, key, value, scale, seen, **more))

    def from_heedful(call: Call) -> None:
        if places[-1].module not in told and not places[-1].multihead:
            places[-1].of_heedful = True
            show(*of_heedful(call), sink_logits=call.sink_logits)

    class FromTorch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            here = places[-1]
            if (
                func is F.scaled_dot_product_attention
                and here.module not in told
                and not (here.multihead or here.of_heedful)
            ):
                show(*of_sdpa(*args, **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            places.append(_Place(module, name))
            if isinstance(module, nn.MultiheadAttention):
                q, k, v, scale, seen, cross = of_multihead(module, args, kwargs)
                show(q, k, v, scale, seen, cross=cross)

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        while places.pop().module is not module:  # of calls that an exception ended
            pass

    by_hand = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]  # of timm
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        for module in by_hand:
            module.fused_attn = True  # type: ignore[assignment]
        with watch(from_heedful), FromTorch():
            yield
    finally:
        for module in by_hand:
            module.fused_attn = False  # type: ignore[assignment]
        for handle in handles:
            handle.remove()
