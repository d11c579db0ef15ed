"""Layer-wise relevance propagation (LRP) through a plain CNN, from a logit down to the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.registry import register

_EPS = 1e-9


@register("lrp-cnn", kind="inspect", paper="salient-relevance", tags=("attribution", "lrp"))
def lrp_cnn(
    layers: nn.Sequential | Sequence[nn.Module],
    x: Float[Tensor, "b *shape"],
    relevance: Float[Tensor, "b classes"] | None = None,
) -> tuple[Float[Tensor, "b classes"], Float[Tensor, "b *shape"]]:
    """The logits, and how much each pixel adds to the highest one, handed down layer by layer.

    A layer with input X and output Y hands down X * (J^T (R / Z)), where R is the relevance of Y and
        Linear      J its positive weights, Z = J X + eps: no bias, so it conserves relevance where X >= 0
        Conv2d      J all weights, Z = Y + eps with the bias, whose share is lost
        MaxPool2d   J the choice of the winners, Z = Y + eps: all goes to them
        AvgPool2d, AdaptiveAvgPool2d   J the mean, Z = Y + eps
        ReLU, Dropout, Flatten, Identity   pass it on
    with eps = 1e-9. Where Z of a convolution is near 0 relevance grows without bound: as published.

    layers     in order; nested nn.Sequential are followed. Of torchvision's AlexNet and VGG
               [model.features, model.avgpool, nn.Flatten(), model.classifier]
    x          a batch of inputs
    relevance  of the logits; by default the highest logit of each row, the others 0

    Raises ValueError for another kind of layer; fold BatchNorm2d into its convolution beforehand
    (torch.nn.utils.fusion.fuse_conv_bn_eval). Source: arXiv 1712.08268, its released code.
    """
    chain = _flat(layers)
    inputs = []
    with torch.no_grad():
        y = x.clone()  # layers may work in place
        for layer in chain:
            inputs.append(y)
            y = y if isinstance(layer, nn.Dropout) else layer(y)
        if relevance is None:
            relevance = y * F.one_hot(y.argmax(-1), y.shape[-1])
    r = relevance
    for layer, given in zip(reversed(chain), reversed(inputs), strict=True):
        r = _handed_down(layer, given, r)
    return y, r


_RULES = (
    nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout, nn.Flatten,
    nn.Identity,
)  # fmt: skip


def _flat(layers: nn.Sequential | Sequence[nn.Module]) -> list[nn.Module]:
    chain: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            chain += _flat(layer)
        elif isinstance(layer, _RULES):
            chain.append(layer)
        else:
            raise ValueError(
                f"layers hold a {type(layer).__name__}, must be of {', '.join(r.__name__ for r in _RULES)}"
            )
    return chain


def _handed_down(layer: nn.Module, x: Tensor, r: Tensor) -> Tensor:
    if isinstance(layer, (nn.ReLU, nn.Dropout, nn.Identity, nn.Flatten)):
        return r.reshape(x.shape)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = F.linear(x, layer.weight.clamp(min=0)) if isinstance(layer, nn.Linear) else layer(x)
        (carried,) = torch.autograd.grad(z, x, r / (z.detach() + _EPS))
    return (x * carried).detach()
