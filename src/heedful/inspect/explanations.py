"""What the output of a model rests on, by several methods, how far they agree and what they foretell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heedful.inspect.attention_gradient import attention_times_gradient
from heedful.inspect.attribution import Attribution
from heedful.inspect.deletion import Curve, deletion_curve, insertion_curve
from heedful.inspect.explanation_agreement import Agreement, explanation_agreement
from heedful.inspect.gradient import gradient, gradient_times_input
from heedful.inspect.integrated_gradients import completeness_gap, integrated_gradients
from heedful.inspect.objective import objective
from heedful.inspect.occlusion import occlusion
from heedful.inspect.sample import Sample, Subject
from heedful.inspect.target import Target
from heedful.inspect.views import View

TEXTS, IMAGES = 3, 1  # that are explained
TOKENS = 128  # of a text that is explained, at most
PATCHES = 196  # of an image, at most; finer ones are joined
RANDOM = 3  # orders by chance to compare with
STEPS = 10  # of the curves


@dataclass(frozen=True, eq=False)
class Explanation:
    """One sample: the number that is explained, its attributions, and what they foretell.

    free      which parts can be taken away; the others always stay
    deletion, insertion   a curve for each attribution and a last one for order by chance, in shares of the
              way from the number for nothing (0) to that for the sample (1)
    gap       by how much integrated gradients miss the number's change, as a share of it
    """

    sample: Sample
    target: Target
    value: float
    nothing: float
    attributions: list[Attribution]
    deletion: list[Curve]
    insertion: list[Curve]
    gap: float

    @property
    def free(self) -> Tensor:
        return self.target.free.cpu()


@dataclass(frozen=True, eq=False)
class Explanations:
    """Of some samples, and why not of others, or not by some method."""

    samples: list[Explanation]
    missing: list[str]

    @property
    def methods(self) -> list[str]:
        """What the rows of all tables are."""
        return [found.method for found in self.samples[0].attributions] if self.samples else []

    def agreement(self) -> Agreement:
        """Kendall's tau-b of the sizes of scores, over the parts that can be taken away."""
        return explanation_agreement(
            [each.attributions for each in self.samples], parts=[each.free for each in self.samples]
        )

    def areas(self) -> list[tuple[str, float, float]]:
        """(method, deletion, insertion): the mean areas, the last row those of chance."""
        rows = [*self.methods, "by chance"]
        return [
            (
                row,
                float(np.mean([each.deletion[i].area for each in self.samples])),
                float(np.mean([each.insertion[i].area for each in self.samples])),
            )
            for i, row in enumerate(rows)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        if not self.samples:
            return {"missing": self.missing}
        agreement = self.agreement()
        return {
            "agreement": {"methods": agreement.methods, "kendall_tau": agreement.table.tolist()},
            "areas": [{"method": m, "deletion": d, "insertion": i} for m, d, i in self.areas()],
            "samples": [
                {
                    "title": each.sample.title,
                    "explained": each.target.name,
                    "value": each.value,
                    "of_nothing": each.nothing,
                    "tokens": each.target.tokens,
                    "scores": {found.method: found.scores.tolist() for found in each.attributions},
                }
                for each in self.samples
            ],
            "missing": self.missing,
        }


def explain(
    subject: Subject,
    views: list[View],
    *,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Explanations:
    """Attributions of the first samples that are not too long, what they agree on and what they foretell.

    views  of the samples, for the rollout of their attention
    """
    rolled = {id(view.sample): view.rollout for view in views}
    chosen: list[Sample] = []
    missing: list[str] = []
    for sample in subject.samples:
        if sample.grid is None and len(sample) > TOKENS:
            missing.append(f"“{sample.title}” has {len(sample)} tokens; at most {TOKENS} are explained.")
        elif len(chosen) < (TEXTS if sample.grid is None else IMAGES):
            chosen.append(sample)
    found: list[Explanation] = []
    for done, sample in enumerate(chosen, start=1):
        try:
            found.append(_explanation(subject, sample, rolled.get(id(sample)), missing))
        except ValueError as wrong:
            missing.append(f"{wrong}.")
        if on_step is not None:
            on_step("explaining", done, len(chosen))
    if found:  # what all have, so that tables have one meaning
        common = set.intersection(*({a.method for a in each.attributions} for each in found))
        found = [_only(each, common) for each in found]
    return Explanations(found, list(dict.fromkeys(missing)))


def _explanation(
    subject: Subject, sample: Sample, rollout: np.ndarray | None, missing: list[str]
) -> Explanation:
    step = _step(sample.grid)
    target = objective(subject, sample, _coarse(sample.grid, step))
    value, nothing = target.with_all(), target.with_none()
    if abs(value - nothing) <= 1e-6 * max(abs(value), abs(nothing)):
        raise ValueError(f"{target.name} stays {value:.4g} when all of “{sample.title}” is taken away")
    made = [gradient(target), gradient_times_input(target), integrated_gradients(target)]
    gap = completeness_gap(target, made[-1]) / (value - nothing)
    try:
        fine = target if step == 1 else objective(subject, sample)
        made.append(_joined(attention_times_gradient(subject.model, fine), target, step))
    except ValueError as wrong:
        missing.append(f"{wrong}.")
    if rollout is not None:
        reach = torch.from_numpy(rollout[sample.prefix :].copy()).float()
        patches = sample.labels[sample.prefix :]
        made.append(_joined(Attribution("attention rollout", patches, reach, sample.grid), target, step))
    made.append(occlusion(target))
    chance = torch.Generator().manual_seed(0)
    orders = [
        Attribution("by chance", target.tokens, torch.rand(len(target.tokens), generator=chance), target.grid)
        for _ in range(RANDOM)
    ]
    ranked = [*(_towards(each, value >= nothing) for each in made), *orders]
    curves: dict[str, list[Curve]] = {}
    for which, curve_of in (("deletion", deletion_curve), ("insertion", insertion_curve)):
        own = [curve_of(target, each, steps=STEPS).between(nothing, value) for each in ranked]
        mean = Curve(own[0].shares, torch.stack([c.values for c in own[len(made) :]]).mean(0))
        curves[which] = [*own[: len(made)], mean]
    return Explanation(sample, target, value, nothing, made, curves["deletion"], curves["insertion"], gap)


def _towards(found: Attribution, rises: bool) -> Attribution:
    """High where a part leads from the number for nothing to that for the sample, be it up or down."""
    if rises or bool((found.scores >= 0).all()):
        return found
    return Attribution(found.method, found.tokens, -found.scores, found.grid)


def _only(each: Explanation, methods: set[str]) -> Explanation:
    kept = [i for i, found in enumerate(each.attributions) if found.method in methods]
    return replace(
        each,
        attributions=[each.attributions[i] for i in kept],
        deletion=[each.deletion[i] for i in [*kept, -1]],
        insertion=[each.insertion[i] for i in [*kept, -1]],
    )


def _step(grid: tuple[int, int] | None) -> int:
    """How many patches a side are joined to one part: the fewest that leave no more than PATCHES."""
    if grid is None:
        return 1
    height, width = grid
    for step in range(1, max(grid) + 1):
        if height % step == 0 and width % step == 0 and height * width <= PATCHES * step * step:
            return step
    raise ValueError(f"{height} × {width} patches cannot be joined to {PATCHES} or fewer")


def _coarse(grid: tuple[int, int] | None, step: int) -> tuple[int, int] | None:
    return None if grid is None else (grid[0] // step, grid[1] // step)


def _joined(found: Attribution, target: Target, step: int) -> Attribution:
    """The scores of patches that are one part, added up."""
    if step == 1:
        return found
    blocks = found.map().unflatten(0, (-1, step)).unflatten(2, (-1, step)).sum((1, 3))
    return Attribution(found.method, target.tokens, blocks.flatten(), target.grid)
