"""Everything that an inspection finds, in plain data: one run a sample, and one a head for its importance."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heedful.inspect.capture import capture
from heedful.inspect.head_importance import (
    cosine_distance,
    head_importance_by_pruning,
    jensen_shannon,
    silenced,
)
from heedful.inspect.head_profile import Habit, HeadProfile, habit_of
from heedful.inspect.rollout import AttentionRollout
from heedful.inspect.sample import Sample, Subject
from heedful.inspect.site import Site

SHOWN = 48  # tokens of a text whose tables are kept for the page
_ENTRIES = 4_000_000  # of all tables that are kept


@dataclass
class Head:
    """One head: means over the samples."""

    layer: int
    head: int
    module: str
    habit: Habit
    features: dict[str, float]
    importance: float = 0.0


@dataclass
class Peak:
    """The largest activation that enters a layer, over all samples."""

    layer: int
    token: str
    channel: int
    value: float
    median: float


@dataclass
class View:
    """What of a sample the page shows: tables of weights, (heads, rows, columns) in 1/255."""

    sample: Sample
    tables: np.ndarray
    received: np.ndarray  # (layers, m), the mean over heads
    rollout: np.ndarray | None  # (m,) the share of each token in the output


@dataclass
class Findings:
    """What was found; `importance` is a cosine distance of embeddings, or a divergence of probabilities."""

    subject: Subject
    heads: list[Head]
    layers: list[int]
    lags: np.ndarray  # (layers, bins), the mean over heads and samples
    views: list[View]
    peaks: list[Peak]
    logits: bool  # whether importance is a divergence (else a cosine distance)
    least_half: float  # what is lost with the less important half of all heads

    @property
    def image(self) -> bool:
        return self.subject.samples[0].grid is not None

    def of_layer(self, layer: int) -> list[Head]:
        return [h for h in self.heads if h.layer == layer]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.subject.name,
            "importance": "Jensen-Shannon divergence" if self.logits else "cosine distance",
            "heads": [
                {
                    "layer": h.layer,
                    "head": h.head,
                    "module": h.module,
                    "habit": h.habit.label,
                    "importance": h.importance,
                    **h.features,
                }
                for h in self.heads
            ],
            "least_half_loss": self.least_half,
            "peaks": [p.__dict__ for p in self.peaks],
            "samples": [
                {"title": v.sample.title, "tokens": v.sample.labels, "received": v.received.tolist()}
                for v in self.views
            ],
        }


@torch.no_grad()
def inspect_model(subject: Subject, *, on_step: Callable[[str, int, int], None] | None = None) -> Findings:
    """Run the subject's samples and find out what its heads of self-attention do and how much they matter.

    on_step: told what is done, how much of it, and of how much.
    Raises ValueError if there is no self-attention over the tokens of the first sample.
    """
    model, training = subject.model, subject.model.training
    model.eval()
    tell = on_step or (lambda what, done, of: None)
    try:
        profiles: list[HeadProfile] = []
        views: list[View] = []
        peaks = _Peaks(model, _attention_names(subject))
        for done, sample in enumerate(subject.samples, start=1):
            profile, tables = HeadProfile(sample), _Tables(sample)
            with capture(model, _both(profile, tables)), peaks.of(sample):
                subject.run(sample)
            profiles.append(profile)
            if not views or sum(v.tables.size for v in views) + tables.entries <= _ENTRIES:
                views.append(tables.view(profile))
            tell("reading", done, len(subject.samples))
        heads = _heads(profiles)
        importance, logits = _importance(subject, tell)
        for head in heads:
            head.importance = importance.get((head.module, head.head), 0.0)
        return Findings(
            subject,
            heads,
            sorted({h.layer for h in heads}),
            _lags(profiles),
            views,
            peaks.peaks(),
            logits,
            _least_half(subject, heads),
        )
    finally:
        model.train(training)


def _both(*see: Callable[[Site], None]) -> Callable[[Site], None]:
    def seen(site: Site) -> None:
        for each in see:
            each(site)

    return seen


def _attention_names(subject: Subject) -> list[str]:
    """The modules of self-attention over all tokens of a sample, by one run."""
    names: list[str] = []
    tokens = len(subject.samples[0])

    def see(site: Site) -> None:
        if not site.cross and site.shape[0] == 1 and site.shape[2:] == (tokens, tokens):
            names.append(site.name)

    with capture(subject.model, see):
        subject.run(subject.samples[0])
    if not names:
        raise ValueError(
            f"{type(subject.model).__name__} has no self-attention over the {tokens} tokens of the input; "
            "heedful inspects models whose attention works on all tokens"
        )
    return names


def _importance(
    subject: Subject, tell: Callable[[str, int, int], None]
) -> tuple[dict[tuple[str, int], float], bool]:
    logits, _ = subject.outcomes()
    found = head_importance_by_pruning(
        subject.model,
        lambda: subject.outcomes()[1],
        measure=jensen_shannon if logits else cosine_distance,
        on_head=lambda done, of: tell("silencing heads", done, of),
    )
    means = found.mean.tolist()
    return {(name, head): x for (name, _, head), x in zip(found.heads, means, strict=True)}, logits


def _least_half(subject: Subject, heads: list[Head]) -> float:
    """What is lost with the less important half of all heads at once."""
    order = sorted(heads, key=lambda h: h.importance)
    logits, before = subject.outcomes()
    with silenced(subject.model, [(h.module, h.head) for h in order[: len(order) // 2]]):
        _, after = subject.outcomes()
    return float((jensen_shannon if logits else cosine_distance)(before, after).mean())


def _heads(profiles: list[HeadProfile]) -> list[Head]:
    image = profiles[0].sample.grid is not None
    heads = []
    for place in sorted(profiles[0].features):
        keys = profiles[0].features[place]
        means, chance = (
            {key: torch.stack([x[place][key] for x in told]).mean(0) for key in keys}
            for told in ([p.features for p in profiles], [p.chance for p in profiles])
        )
        for h in range(len(means["entropy"])):
            features = {key: float(x[h]) for key, x in means.items()}
            even = {key: float(x[h if len(x) > 1 else 0]) for key, x in chance.items()}
            heads.append(Head(place[0], h, place[1], habit_of(features, even, image=image), features))
    return heads


def _lags(profiles: list[HeadProfile]) -> np.ndarray:
    """(layers, bins) of the longest sample's bins; shorter ones have fewer and are put in the middle."""
    bins = max(x.shape[1] for p in profiles for x in p.lags.values())
    layers = sorted({layer for layer, _ in profiles[0].lags})
    table = np.zeros((len(layers), bins))
    for p in profiles:
        for (layer, _), x in p.lags.items():
            row = x.mean(0).numpy()
            first = (bins - len(row)) // 2
            table[layers.index(layer), first : first + len(row)] += row
    return table / table.sum(1, keepdims=True).clip(1e-12)


class _Tables:
    """Keeps the tables of a sample's heads for the page, as bytes, of as many tokens as are shown."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.tables: dict[tuple[int, str], np.ndarray] = {}
        self.rollout: AttentionRollout | None = AttentionRollout() if len(sample) <= 512 else None
        self.causal = False

    @property
    def entries(self) -> int:
        return sum(t.size for t in self.tables.values())

    def __call__(self, site: Site) -> None:
        b, _, n, m = site.shape
        if site.cross or b != 1 or n != m or m != len(self.sample):
            return
        if self.sample.grid is None:
            shown = min(SHOWN, m)
            weights = site.weights(slice(0, shown))[0, :, :, :shown].float()
        else:
            weights = _pooled_rows(site.weights()[0].float(), self.sample)
        self.tables[site.layer, site.name] = (weights * 255).round().byte().cpu().numpy()
        if self.rollout is not None:
            self.rollout(site)
            self.causal = not bool(site.visible()[0, 0, 0, -1])

    def view(self, profile: HeadProfile) -> View:
        places = sorted(self.tables)
        layers = sorted({layer for layer, _ in places})
        received = [
            torch.cat([profile.received[p] for p in places if p[0] == layer]).mean(0).numpy()
            for layer in layers
        ]
        reach = None
        if self.rollout is not None and self.rollout.table is not None:
            table = self.rollout.table[0]
            reach = (table[-1] if self.causal else table.mean(0)).cpu().numpy()
        return View(self.sample, np.concatenate([self.tables[p] for p in places]), np.stack(received), reach)


def _pooled_rows(weights: Tensor, sample: Sample) -> Tensor:
    """Rows of patches, joined to at most 8 x 8 blocks; columns stay."""
    assert sample.grid is not None
    height, width = sample.grid
    step = max(1, -(-max(height, width) // 8))
    patches = weights[:, sample.prefix :].transpose(1, 2).unflatten(2, sample.grid)
    joined = nn.functional.avg_pool2d(patches, step, ceil_mode=True, count_include_pad=False)
    return torch.cat([weights[:, : sample.prefix], joined.flatten(2).transpose(1, 2)], dim=1)


class _Peaks:
    """The largest activations entering each layer, by hooks on the blocks that hold the attention modules."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        modules = dict(model.named_modules())
        self.blocks: dict[int, nn.Module] = {}
        self.found: dict[int, Peak] = {}
        for name in names:
            match = re.match(r"(?:.*?\.)?(\d+)(?=\.)", name)
            if match:
                self.blocks[int(match[1])] = modules[match[0]]

    @contextmanager
    def of(self, sample: Sample) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in self.blocks.items():
                hook = partial(self._look, layer, sample)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _look(
        self, layer: int, sample: Sample, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != len(sample):
            return
        size = hidden[0].float().abs()
        token, channel = divmod(int(size.argmax()), size.shape[1])
        peak = Peak(layer, sample.labels[token], channel, float(size.max()), float(size.median()))
        if layer not in self.found or peak.value > self.found[layer].value:
            self.found[layer] = peak

    def peaks(self) -> list[Peak]:
        return [self.found[layer] for layer in sorted(self.found)]
