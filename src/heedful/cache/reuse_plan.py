"""Which layers of a model may reuse what an earlier one attended to: profiles, and a plan from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from heedful.checks import check_positive
from heedful.hf.tap import Handler, Site, tap


@dataclass(frozen=True)
class Sensitivity:
    """What happens when a layer alone attends to its own largest entries.

    error       (layers) |o' - o| / |o| of the layer's attention output
    divergence  (layers) KL divergence of the next-token distributions from the full ones, in nats
    """

    error: Float[Tensor, " layers"]
    divergence: Float[Tensor, " layers"]


def layer_overlap(
    model: PreTrainedModel, samples: Iterable[Int[Tensor, "b n"]], *, tokens: int
) -> Float[Tensor, "layers layers"]:
    """The part of the `tokens` entries most attended to that two layers share, mean over the sample prompts.

        M[i, j] = |S_i and S_j| / k,   S = top k of the last query's weights, averaged over heads

    k is `tokens`, or the length of a shorter prompt. Source: HyLRA, arXiv 2602.00777.
    """
    check_positive("tokens", tokens)
    total, count = None, 0
    for ids in samples:
        seen = _Chosen(tokens)
        with tap(model, seen), torch.no_grad():
            model(ids, use_cache=False)
        member = torch.stack([seen.member[i] for i in sorted(seen.member)]).double()  # layers, b, n
        shared = torch.einsum("ibn, jbn -> ij", member, member) / member[0].sum()
        total = shared if total is None else total + shared
        count += 1
    if total is None:
        raise ValueError("samples is empty, must hold at least one batch of token ids")
    return (total / count).float()


def layer_sensitivity(
    model: PreTrainedModel, samples: Iterable[Int[Tensor, "b n"]], *, tokens: int
) -> Sensitivity:
    """What each layer loses by attending, in the last row, to its own `tokens` largest entries alone."""
    check_positive("tokens", tokens)
    samples = list(samples)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    error, divergence = torch.zeros(layers), torch.zeros(layers)
    for ids in samples:
        with torch.no_grad():
            whole = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
            for layer in range(layers):
                cut = _Cut(layer, tokens)
                with tap(model, cut):
                    part = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
                error[layer] += cut.error / len(samples)
                divergence[layer] += float(
                    F.kl_div(part, whole, reduction="batchmean", log_target=True)
                ) / len(samples)
    return Sensitivity(error, divergence)


def plan_layer_reuse(
    shared: Float[Tensor, "layers layers"],
    *,
    sensitive: Bool[Tensor, " layers"] | Sequence[bool] | None = None,
    overlap: float = 0.85,
) -> list[int | None]:
    """For each layer None, to be full, or the full layer whose entries it reuses; the fewest full layers.

    Layer 0 is full. Layer j may reuse the last full layer i before it if shared[i, j] >= overlap and j is
    not sensitive. Among plans with as few full layers the one with the largest sum of shared[i, j] wins.
    A dynamic programme over the last full layer. Source: HyLRA, arXiv 2602.00777.

    shared     as `layer_overlap` gives it
    sensitive  layers that must be full
    """
    layers = shared.shape[0]
    if shared.shape != (layers, layers):
        raise ValueError(f"shared has shape {tuple(shared.shape)}, must be (layers, layers)")
    must = [False] * layers if sensitive is None else [bool(x) for x in sensitive]
    if len(must) != layers:
        raise ValueError(f"sensitive has {len(must)} entries, must have one for each of {layers} layers")
    gain = shared.double().tolist()
    best: list[tuple[int, float]] = [
        (1, 0.0)
    ]  # of the layers before and with j, j full: (full layers, -gain)
    before: list[int] = [-1]
    whole: list[tuple[int, float, int]] = []  # of all layers, by the last full one
    for j in range(1, layers + 1):
        options = []
        for i in range(j):
            between = range(i + 1, j)
            if any(must[x] or gain[i][x] < overlap for x in between):
                continue
            options.append((best[i][0], best[i][1] - sum(gain[i][x] for x in between), i))
        if j == layers:
            whole = options
            break
        count, cost, i = min(options)
        best.append((count + 1, cost))
        before.append(i)
    last = min(whole)[2]
    full = set()
    while last >= 0:
        full.add(last)
        last = before[last]
    return [None if j in full else max(i for i in full if i < j) for j in range(layers)]


def check_sources(sources: Sequence[int | None], layers: Sequence[int]) -> None:
    """A ValueError unless, of these layers, each has None or the last layer with None before it."""
    last = None
    for j in layers:
        if sources[j] is None:
            last = j
        elif sources[j] != last:
            raise ValueError(
                f"sources has {sources[j]} for layer {j}, must have None or the last full layer "
                f"before it, {last}"
            )


def top(weights: Float[Tensor, "b hq m"], tokens: int) -> Bool[Tensor, "b m"]:
    """The `tokens` keys with the largest weights, averaged over heads."""
    scores = weights.float().mean(1)
    index = scores.topk(min(tokens, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)


class _Chosen(Handler):
    """Notes the choice of every layer."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.member: dict[int, Tensor] = {}

    def see(self, site: Site) -> None:
        if not site.cross:
            self.member[site.layer] = top(site.weights(slice(-1, None))[:, :, 0], self.tokens)


class _Cut(Handler):
    """Lets the last query of one layer attend to that layer's own choice."""

    def __init__(self, layer: int, tokens: int) -> None:
        self.layer, self.tokens = layer, tokens
        self.error = 0.0

    def wants(self, site: Site) -> bool:
        return site.layer == self.layer and not site.cross

    def output(self, site: Site, output: Float[Tensor, "b hq n e"]) -> Float[Tensor, "b hq n e"]:
        logits = site.logits(slice(-1, None))
        kept = top(site.softmax(logits)[:, :, 0], self.tokens)
        cut = site.mix(site.softmax(logits.masked_fill(~kept[:, None, None], -torch.inf)))
        whole = output[:, :, -1:]
        self.error = float((cut - whole).float().norm() / whole.float().norm())
        return torch.cat([output[:, :, :-1], cut], dim=2)
