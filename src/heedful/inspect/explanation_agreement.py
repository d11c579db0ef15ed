"""Whether explanations of the same outputs agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.inspect.attribution import Attribution
from heedful.inspect.rank_correlation import kendall_tau
from heedful.registry import register


@dataclass(frozen=True, eq=False)
class Agreement:
    """The mean agreement of each pair of methods over the instances, 1 on the diagonal."""

    methods: list[str]
    table: Float[Tensor, "methods methods"]

    @property
    def mean(self) -> float:
        """Over the pairs of different methods; 1 if there is but one method."""
        count = len(self.methods)
        if count < 2:
            return 1.0
        return float((self.table.sum() - self.table.trace()) / (count * (count - 1)))


@register("explanation-agreement", kind="inspect", paper="song-of-disagreement", tags=("agreement",))
def explanation_agreement(
    instances: Sequence[Sequence[Attribution]],
    *,
    measure: Callable[[Tensor, Tensor], float] = kendall_tau,
    parts: Sequence[Bool[Tensor, " _"]] | None = None,
) -> Agreement:
    """How far methods rank the parts of an input alike, by the size of their scores: a mean over instances.

    instances  for each instance its attributions, by the same methods in the same order
    measure    (scores, scores) -> a number: `kendall_tau`, `spearman`, `pearson`, `weighted_kendall_tau`, or
               `lambda a, b: kendall_top_k(a, b, k)[0]`
    parts      for each instance the parts that are compared; by default all

    That methods agree does not make them right: the source finds little agreement, and advises against
    judging an explanation by it. Raises ValueError where methods or lengths differ, or there is no instance.
    Source: arXiv 2205.04559.
    """
    if not instances:
        raise ValueError("instances are none, must be at least one")
    methods = [found.method for found in instances[0]]
    table = torch.zeros(len(methods), len(methods), dtype=torch.float64)
    for number, found in enumerate(instances):
        if [x.method for x in found] != methods:
            raise ValueError(
                f"instance {number} has {', '.join(x.method for x in found)}, must have "
                f"{', '.join(methods)} as the first one"
            )
        scores = [x.magnitude for x in found]
        if parts is not None:
            scores = [x[parts[number].cpu()] for x in scores]
        for i, a in enumerate(scores):
            for j, b in enumerate(scores):
                table[i, j] += 1.0 if i == j else measure(a, b)
    return Agreement(methods, table / len(instances))
