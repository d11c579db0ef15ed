"""Attention sinks: tokens that draw attention from everywhere, and the massive activations behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.registry import register


def received_attention(
    weights: Float[Tensor, "*b h n m"], visible: Bool[Tensor, "*c n m"]
) -> tuple[Float[Tensor, "*b h m"], Float[Tensor, "*c m"]]:
    """The attention each key gets, summed over queries, and by how many queries it may be seen.

    Both add up over pieces of rows; their quotient is the mean weight of a key among those who may see it.
    """
    return weights.sum(-2), visible.sum(-2).to(weights.dtype)


@register("attention-sinks", kind="inspect", paper="var-visattnsink", tags=("sink",))
def find_sinks(
    received: Float[Tensor, "*b m"], *, share: float = 0.3, least: float = 3.0
) -> Bool[Tensor, "*b m"]:
    """The keys that get more than `share` of the attention of a query that may see them, on average.

    received  the mean weight of each key, the quotient of `received_attention`
    least     and at least so many times the mean over the keys, so that among few keys there is no sink
              where attention is uniform

    The thresholds are ours; 0.3 is what work on attention sinks commonly takes.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is {share}, must lie between 0 and 1")
    return (received > share) & (received >= least * received.mean(-1, keepdim=True))


def sink_score(hidden: Float[Tensor, "b n c"], dims: Sequence[int]) -> Float[Tensor, "b n"]:
    """How massive the activation of a token is in the given channels, in float32.

        phi(x) = max_{d in dims} |x_d| / sqrt(mean(x^2) + 1e-6)

    Source: arXiv 2503.03321.
    """
    x = hidden.float()
    norm = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(dims)].abs().amax(-1) / norm


def find_sink_dims(hidden: Float[Tensor, "n c"], *, count: int = 2) -> list[int]:
    """The channels in which the first token is most massive: those of its largest normalised activations."""
    first = hidden[0].float()
    return first.abs().topk(count).indices.tolist()


@register("sink-tokens", kind="inspect", paper="var-visattnsink", tags=("sink", "activation"))
def find_sink_tokens(
    hidden: Float[Tensor, "b n c"], *, dims: Sequence[int] | None = None, threshold: float = 20.0
) -> Bool[Tensor, "b n"]:
    """The tokens whose activations are massive: `sink_score` > threshold.

    hidden  what enters a layer, before its norm
    dims    the model's channels of massive activations; None: the two largest of each row's first token

    Source: arXiv 2503.03321.
    """
    if dims is not None:
        return sink_score(hidden, dims) > threshold
    scores = [sink_score(row[None], find_sink_dims(row)) for row in hidden]
    return torch.cat(scores) > threshold


@register("massive-activations", kind="inspect", paper="massive-activations", tags=("sink", "activation"))
def massive_activations(
    hidden: Float[Tensor, "b n c"], *, least: float = 100.0, times: float = 1000.0
) -> Bool[Tensor, "b n c"]:
    """Where |x| is above `least` and above `times` the median |x| of the whole hidden state of a text.

    Source: Massive Activations in Large Language Models, arXiv 2402.17762, whose thresholds these are.
    """
    size = hidden.float().abs()
    middle = size.flatten(1).median(-1).values[:, None, None]
    return (size > least) & (size > times * middle)
