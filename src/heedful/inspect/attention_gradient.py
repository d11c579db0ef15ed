"""Attribution by attention times its gradient: what a number loses when nobody looks at a token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.inspect.attribution import Attribution
from heedful.inspect.capture import capture
from heedful.inspect.site import Site
from heedful.inspect.target import Target
from heedful.registry import register


@dataclass
class _Seen:
    """A call, a tensor that its heads' output went into, and from that one's gradient to the heads' own."""

    site: Site
    output: Tensor
    to_heads: Callable[[Tensor], Tensor] = lambda slope: slope.reshape(-1, *slope.shape[-3:])


@register(
    "attention-times-gradient", kind="inspect", paper="song-of-disagreement", tags=("attribution", "gradient")
)
def attention_times_gradient(model: nn.Module, target: Target) -> Attribution:
    """sum over layers l, heads h and queries i of A_lhij dF/dA_lhij, for each token j.

    It is what the number F changes by, to first order, for each percent that all attention to token j is
    turned up by, the other weights as they are, times 100.

    model   whose self-attention is looked at: of transformers, torch.nn.MultiheadAttention, or one that calls
            scaled_dot_product_attention (timm, and heedful where it computes with that)
    target  the number F, computed with this model

    The gradient to a weight is that to the head's output times the value, dF/dA_ij = dF/do_i . v_j, so it
    needs no table inside the model. Of images, tokens before the patches are left out.
    Raises ValueError if no self-attention over the parts of the input can be seen.
    """
    calls: list[_Seen] = []
    x = target.x.detach().clone().requires_grad_()
    with torch.enable_grad(), _outputs(model, calls.append):
        value = target.value(x[None])[0]
    parts = len(target.tokens)
    own = [call for call in calls if _over_parts(call.site, parts, image=target.grid is not None)]
    if not own:
        raise ValueError(
            f"{type(model).__name__} shows no self-attention over the {parts} parts of the input that can be "
            "followed to the output, which attention times gradient needs"
        )
    slopes = torch.autograd.grad(value, [call.output for call in own], allow_unused=True)
    total = x.new_zeros(own[0].site.shape[3])
    for call, slope in zip(own, slopes, strict=True):
        if slope is not None:
            site = call.site
            groups = site.shape[1] // site.value.shape[1]
            heads = call.to_heads(slope).unflatten(1, (-1, groups))
            by_weight = (heads @ site.value[:, :, None].mT).flatten(1, 2)
            total = total + (site.weights() * by_weight).detach().sum((0, 1, 2))
    return Attribution("attention × gradient", target.tokens, total[-parts:].cpu(), target.grid)


def _over_parts(site: Site, parts: int, *, image: bool) -> bool:
    b, _, n, m = site.shape
    return not site.cross and b == 1 and n == m and (m >= parts if image else m == parts)


@contextmanager
def _outputs(model: nn.Module, see: Callable[[_Seen], None]) -> Iterator[None]:
    """Shows each attention call with its output, in the graph of the model's output."""
    with ExitStack() as stack:
        if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
            from heedful.hf.tap import Handler, tap

            class Show(Handler):
                def output(self, site: Site, output: Tensor) -> Tensor:
                    see(_Seen(site, output))
                    return output

            stack.enter_context(tap(model, Show()))
        else:
            waiting: list[Site] = []  # the call that is computed now
            stack.enter_context(capture(model, lambda site: waiting.__setitem__(slice(None), [site])))
            stack.enter_context(_ShowOutput(waiting, see))  # inside, so that it is asked first
        yield


class _ShowOutput(TorchFunctionMode):
    """Follows the outputs of PyTorch's attention functions, for the call that waits for one."""

    def __init__(self, waiting: list[Site], see: Callable[[_Seen], None]) -> None:
        super().__init__()
        self.waiting, self.see = waiting, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and self.waiting:
            # (query, key, value, embed_dim, heads, ..., dropout, out_proj_weight, ...) -> (n, b, c), ...
            heads, out = args[4], args[11]
            self.see(
                _Seen(
                    self.waiting.pop(),
                    output[0],
                    lambda slope: rearrange(slope @ out, "n b (h d) -> b h n d", h=heads),
                )
            )
        elif func is F.scaled_dot_product_attention and self.waiting:
            site = self.waiting.pop()
            if output.shape[-3:-1] == site.query.shape[1:3]:
                self.see(_Seen(site, output))
        return output
