"""Attribution by attention times its gradient: what a number loses when nobody looks at a token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.inspect.attribution import Attribution
from heedful.inspect.capture import capture
from heedful.inspect.site import Site
from heedful.inspect.target import Target
from heedful.registry import register


@register(
    "attention-times-gradient", kind="inspect", paper="song-of-disagreement", tags=("attribution", "gradient")
)
def attention_times_gradient(model: nn.Module, target: Target) -> Attribution:
    """sum over layers l, heads h and queries i of A_lhij dF/dA_lhij, for each token j.

    It is what the number F changes by, to first order, for each percent that all attention to token j is
    turned up by, the other weights as they are.

    model   whose self-attention is looked at: of transformers, or of scaled_dot_product_attention (timm)
    target  the number F, computed with this model

    The gradient to a weight is that to the head's output times the value, dF/dA_ij = dF/do_i . v_j, so it
    needs no table inside the model. Of images, tokens before the patches are left out.
    Raises ValueError if no self-attention over the parts of the input can be seen.
    """
    calls: list[tuple[Site, Tensor]] = []
    x = target.x.detach().clone().requires_grad_()
    with torch.enable_grad(), _outputs(model, lambda site, output: calls.append((site, output))):
        value = target.value(x[None])[0]
    parts = len(target.tokens)
    own = [(site, o) for site, o in calls if _over_parts(site, parts, image=target.grid is not None)]
    if not own:
        raise ValueError(
            f"{type(model).__name__} shows no self-attention over the {parts} parts of the input; attention "
            "times gradient needs that of a transformers model or of scaled_dot_product_attention"
        )
    slopes = torch.autograd.grad(value, [output for _, output in own], allow_unused=True)
    total = x.new_zeros(own[0][0].shape[3])
    for (site, _), slope in zip(own, slopes, strict=True):
        if slope is not None:
            groups = site.shape[1] // site.value.shape[1]
            by_weight = (slope.unflatten(1, (-1, groups)) @ site.value[:, :, None].mT).flatten(1, 2)
            total = total + (site.weights() * by_weight).detach().sum((0, 1, 2))
    return Attribution("attention × gradient", target.tokens, total[-parts:].cpu(), target.grid)


def _over_parts(site: Site, parts: int, *, image: bool) -> bool:
    b, _, n, m = site.shape
    return not site.cross and b == 1 and n == m and (m >= parts if image else m == parts)


@contextmanager
def _outputs(model: nn.Module, see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Shows each attention call with what its heads put out, in the graph of the model's output."""
    with ExitStack() as stack:
        if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
            from heedful.hf.tap import Handler, tap

            class Show(Handler):
                def output(self, site: Site, output: Tensor) -> Tensor:
                    see(site, output)
                    return output

            stack.enter_context(tap(model, Show()))
        else:
            sites: list[Site] = []

            class ShowOutput(TorchFunctionMode):
                def __torch_function__(
                    self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                ) -> Any:
                    before = len(sites)
                    output = func(*args, **(kwargs or {}))
                    if func is F.scaled_dot_product_attention and len(sites) > before:
                        see(sites[-1], output)
                    return output

            stack.enter_context(capture(model, sites.append))
            stack.enter_context(ShowOutput())  # inside, so that it is asked first
        yield
