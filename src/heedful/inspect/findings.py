"""Everything that an inspection finds, in plain data: one run a sample, and one a head for its importance."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heedful.inspect.capture import capture
from heedful.inspect.explanations import Explanations, explain
from heedful.inspect.head_importance import (
    cosine_distance,
    head_importance_by_pruning,
    jensen_shannon,
    silenced,
)
from heedful.inspect.head_profile import Habit, HeadProfile, habit_of
from heedful.inspect.peaks import Peak, Peaks
from heedful.inspect.sample import Subject
from heedful.inspect.site import Site
from heedful.inspect.views import Tables, View

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
    explanations: Explanations  # what the output rests on
    others: int = 0  # layers of self-attention over other tokens, which are left out

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
            "explanations": self.explanations.as_dict(),
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
        layers, others = _layers(subject)
        stages = len(set(layers.values())) < len(layers)  # whose first numbers are not those of layers
        if stages:
            layers = {name: i for i, name in enumerate(layers)}
        peaks = Peaks(model, [] if stages else [*layers])
        for done, sample in enumerate(subject.samples, start=1):
            profile, tables = HeadProfile(sample), Tables(sample)
            with capture(model, _both(layers, profile, tables)), peaks.of(sample):
                subject.run(sample)
            profiles.append(profile)
            if not views or sum(v.tables.size for v in views) + tables.entries <= _ENTRIES:
                views.append(tables.view(profile))
            tell("reading", done, len(subject.samples))
        heads = _heads(profiles)
        importance, logits = _importance(subject, layers, tell)
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
            explain(subject, views, on_step=tell),
            others,
        )
    finally:
        model.train(training)


def _both(layers: dict[str, int], *see: Callable[[Site], None]) -> Callable[[Site], None]:
    def seen(site: Site) -> None:
        site.layer = layers.get(site.name, site.layer)
        for each in see:
            each(site)

    return seen


def _layers(subject: Subject) -> tuple[dict[str, int], int]:
    """The modules of self-attention over all tokens of a sample with their layers, and how many others."""
    layers: dict[str, int] = {}
    others: set[str] = set()
    tokens = len(subject.samples[0])

    def see(site: Site) -> None:
        if not site.cross and site.shape[0] == 1 and site.shape[2:] == (tokens, tokens):
            layers[site.name] = site.layer
        elif not site.cross:
            others.add(site.name)

    with capture(subject.model, see):
        subject.run(subject.samples[0])
    if not layers:
        raise ValueError(
            f"{type(subject.model).__name__} has no self-attention over the {tokens} tokens of the input; "
            "heedful inspects models whose attention works on all tokens"
        )
    return layers, len(others - layers.keys())


def _importance(
    subject: Subject, modules: Container[str], tell: Callable[[str, int, int], None]
) -> tuple[dict[tuple[str, int], float], bool]:
    logits, _ = subject.outcomes()
    found = head_importance_by_pruning(
        subject.model,
        lambda: subject.outcomes()[1],
        measure=jensen_shannon if logits else cosine_distance,
        modules=modules,
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
