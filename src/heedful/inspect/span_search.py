"""The spans of attention heads that a given model can do with."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_divides, check_positive
from heedful.patterns.elastic_span import ElasticSpan
from heedful.registry import register


@dataclass(frozen=True)
class SpanPlan:
    """A span alpha + beta N for every head of every layer.

    alphas, betas  (layers)(heads), alphas in tokens
    losses         what the plan costs at each profiled length, where a search made it

    `as_dict` and `from_dict` speak the format in which MoA's plans are released.
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]
    sink: int = 64
    block_size: int = 64
    losses: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, told: Mapping[str, Any], *, sink: int = 64, block_size: int = 64) -> SpanPlan:
        """From {"alphas": [layers][heads], "betas": [layers][heads]}."""
        alphas, betas = (
            tuple(tuple(float(x) for x in layer) for layer in told[name]) for name in ("alphas", "betas")
        )
        if [len(layer) for layer in alphas] != [len(layer) for layer in betas]:
            raise ValueError("alphas and betas must have the same layers and heads")
        return cls(alphas, betas, sink, block_size)

    def as_dict(self) -> dict[str, list[list[float]]]:
        """{"alphas": [layers][heads], "betas": [layers][heads]}."""
        return {"alphas": [list(x) for x in self.alphas], "betas": [list(x) for x in self.betas]}

    def patterns(self, *, length: int | None = None, group: int = 1) -> dict[int, ElasticSpan]:
        """The pattern of each layer, as `heedful.hf.use_pattern` takes them.

        length: N, fixed; None: every query has its own. group: query heads that share a head of the plan.
        """
        check_positive("group", group)
        return {
            layer: ElasticSpan(
                tuple(a for a in alphas for _ in range(group)),
                tuple(b for b in betas for _ in range(group)),
                self.sink,
                self.block_size,
                length,
            )
            for layer, (alphas, betas) in enumerate(zip(self.alphas, self.betas, strict=True))
        }

    def density(self, n: int) -> float:
        """Share of n keys that the last query sees, the mean over layers and heads."""
        of_layers = [pattern.kv_density(n) for pattern in self.patterns(length=n).values()]
        return float(torch.cat(of_layers).mean())


def span_candidates(
    lengths: Sequence[int], *, max_length: int | None = None, step: int = 1024, betas: int = 9
) -> list[tuple[float, float]]:
    """The rules (alpha, beta) among which heads choose.

    alpha from -min(lengths) to max(lengths), about `step` tokens apart, beta from 0 to 1 in `betas` values;
    of these, all whose span alpha + beta N is at most N at max(lengths) and max_length, and above 0 at
    min(lengths).
    """
    least, most = min(lengths), max(lengths)
    longest = most if max_length is None else max_length
    check_positive("step", step)
    alphas = np.linspace(-least, most, (most + least) // step + 1)
    return [
        (float(a), float(b))
        for a in alphas
        for b in np.linspace(0, 1, betas)
        if a + b * most <= most and a + b * longest <= longest and a + b * least > 0
    ]


@register("span-search", kind="inspect", paper="moa", tags=("profiling", "search"))
def search_spans(
    influence: Mapping[int, Float[Tensor, "layers h i j"]],
    *,
    density: float = 0.5,
    max_length: int | None = None,
    group: int = 1,
    kinds: int = 2,
    floor: float = 0.9,
    intervals: int = 4,
    candidates: Sequence[tuple[float, float]] | None = None,
    sink: int = 64,
    block_size: int = 64,
    solver: str | None = None,
    time_limit: float | None = None,
) -> list[SpanPlan]:
    """Plans of spans under a budget of density, none of which is better than another at all lengths.

        minimise, at each profiled length,  sum over heads of |influence| in the blocks that the span hides
        with, at each length,               floor * density <= mean density <= density
        and in each layer                   at most `kinds` different rules

    The lengths are objectives of their own: each in turn is minimised while the others are held below the
    ends of `intervals` equal parts of their ranges, and of all plans found those that no other beats stay,
    the first length's best first. Take the one whose model has the lowest loss on a longer text.

    influence   of each profiled length, what `profile_influence` gives for texts of that length
    max_length  a longer length at which the density is bounded too; None: none
    group       query heads that share a KV head: a plan is made for KV heads, and of a group the largest
                influence counts
    candidates  rules (alpha, beta); None: `span_candidates`
    solver      "milp": an integer programme, with scipy; "greedy": each layer chooses rules at a common price
                of density, without the floor and with one plan a length and one for their sum; None: milp
                where scipy is installed
    time_limit  seconds an integer programme may take; the best plan found by then counts

    ValueError where influence does not fit its length, or where no plan fits the budget.
    Source: MoA, arXiv 2406.14909, whose authors solve with Gurobi.
    """
    check_choice("solver", solver, (None, "milp", "greedy"))
    check_positive("kinds", kinds)
    check_positive("intervals", intervals)
    if not influence:
        raise ValueError("influence is empty, must hold at least one length")
    if solver is None:
        solver = "milp" if importlib.util.find_spec("scipy") else "greedy"
    lengths = sorted(influence)
    rules = list(candidates or span_candidates(lengths, max_length=max_length))
    if not rules:
        raise ValueError(f"no candidate span fits lengths {lengths} and max_length {max_length}")
    pattern = ElasticSpan([a for a, _ in rules], [b for _, b in rules], sink, block_size)
    losses = np.stack([_losses(influence[n], n, group, pattern) for n in lengths])  # (k, layers, h, rules)
    bounded = [*lengths, max_length] if max_length is not None and max_length not in lengths else lengths
    shares = np.stack([pattern.kv_density(n).numpy() for n in bounded])  # (bounded, rules)

    if solver == "greedy":
        problem = _Greedy(losses, shares, density, kinds)
        found = [problem.solve(goal) for goal in (*losses, losses.sum(0))]
    else:
        milp = _Programme(losses, shares, density, floor, kinds, time_limit)
        found = _sweep(milp, losses, intervals)
    plans: dict[tuple[float, ...], SpanPlan] = {}
    for choice in found:
        if choice is None:
            continue
        alphas = tuple(tuple(rules[c][0] for c in layer) for layer in choice.tolist())
        betas = tuple(tuple(rules[c][1] for c in layer) for layer in choice.tolist())
        cost = _cost(losses, choice)
        plans.setdefault(cost, SpanPlan(alphas, betas, sink, block_size, cost))
    if not plans:
        raise ValueError(f"density is {density} with floor {floor}: no plan of the candidates fits it")
    return [plans[cost] for cost in sorted(plans) if not any(_beats(other, cost) for other in plans)]


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _cost(losses: np.ndarray, choice: np.ndarray) -> tuple[float, ...]:
    return tuple(float(np.take_along_axis(x, choice[..., None], 2).sum()) for x in losses)


def _losses(influence: Tensor, n: int, group: int, pattern: ElasticSpan) -> np.ndarray:
    """(layers, heads, rules): influence in the blocks that each rule hides at length n."""
    size = pattern.block_size
    blocks = -(-n // size)
    if influence.ndim != 4 or influence.shape[2:] != (blocks, blocks):
        raise ValueError(
            f"influence[{n}] has shape {tuple(influence.shape)}, "
            f"must be (layers, heads, {blocks}, {blocks}) for blocks of {size} tokens"
        )
    check_divides("group", group, "the number of heads", influence.shape[1])
    heads = influence.double().abs().unflatten(1, (-1, group)).amax(2)
    heads[..., : pattern.sink // size] = 0  # the sink is never hidden
    # Influence by distance in blocks; a span hides its own length and all beyond.
    by_distance = torch.stack([heads.diagonal(-d, 2, 3).sum(-1) for d in range(blocks)], dim=-1)
    beyond = by_distance.flip(-1).cumsum(-1).flip(-1)
    beyond = torch.cat([beyond, torch.zeros_like(beyond[..., :1])], dim=-1)
    return beyond[..., pattern.spans(blocks).clamp(max=blocks)].numpy()


def _sweep(problem: _Programme, losses: np.ndarray, intervals: int) -> list[np.ndarray | None]:
    """Each objective in turn, the others held below the ends of equal parts of their ranges."""
    best = [problem.solve(goal, {}) for goal in losses]
    if len(losses) == 1 or any(choice is None for choice in best):
        return best
    table = np.array([_cost(losses, choice) for choice in best if choice is not None])
    low, high = table.min(0), table.max(0)
    found = list(best)
    for primary in range(len(losses)):
        others = [o for o in range(len(losses)) if o != primary]
        ends = [low[o] + (high[o] - low[o]) * np.arange(1, intervals + 1) / intervals for o in others]
        for bounds in itertools.product(*ends):
            found.append(problem.solve(losses[primary], dict(zip(others, bounds, strict=True))))
    return found


class _Programme:
    """The integer programme: x[l, h, c], head h of layer l takes rule c; y[l, c], some head of l takes it."""

    def __init__(
        self,
        losses: np.ndarray,
        shares: np.ndarray,
        density: float,
        floor: float,
        kinds: int,
        time_limit: float | None,
    ) -> None:
        from scipy import sparse
        from scipy.optimize import LinearConstraint

        self.losses, self.options = losses, {} if time_limit is None else {"time_limit": time_limit}
        _, layers, heads, rules = losses.shape
        taken, kept = layers * heads * rules, layers * rules
        one = sparse.kron(sparse.eye(layers * heads), np.ones((1, rules)))
        few = sparse.kron(sparse.eye(layers), np.ones((1, rules)))
        of_layer = sparse.kron(sparse.eye(layers), sparse.kron(np.ones((heads, 1)), sparse.eye(rules)))
        mean = np.tile(shares, (1, layers * heads)) / (layers * heads)

        def rows(x: Any, y: Any, low: float, high: float) -> LinearConstraint:
            count = (x if x is not None else y).shape[0]
            x = sparse.csr_array((count, taken)) if x is None else x
            y = sparse.csr_array((count, kept)) if y is None else y
            return LinearConstraint(sparse.hstack([x, y], format="csr"), low, high)

        self.rows = rows
        self.constraints = [
            rows(one, None, 1.0, 1.0),
            rows(sparse.eye(taken), -of_layer, -np.inf, 0.0),
            rows(None, few, -np.inf, float(kinds)),
            rows(mean, None, floor * density, density),
        ]
        self.shape = (layers, heads, rules)

    def solve(self, goal: np.ndarray, bounds: dict[int, float]) -> np.ndarray | None:
        """(layers, heads): the rule of each head; None where nothing fits."""
        from scipy.optimize import Bounds, milp

        layers, heads, rules = self.shape
        limits = [
            self.rows(self.losses[o].reshape(1, -1), None, -np.inf, bound * (1 + 1e-9) + 1e-12)
            for o, bound in bounds.items()
        ]
        # Scaled, because influences may be far below the solver's tolerances.
        cost = np.concatenate([goal.ravel() / (goal.max() or 1.0), np.zeros(layers * rules)])
        done = milp(
            cost,
            constraints=[*self.constraints, *limits],
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            options=self.options,
        )
        if done.x is None:
            return None
        return done.x[: layers * heads * rules].reshape(self.shape).argmax(-1)


class _Greedy:
    """Rules at a common price of density: the least price at which the budget holds."""

    def __init__(self, losses: np.ndarray, shares: np.ndarray, density: float, kinds: int) -> None:
        self.shares, self.density, self.kinds = shares, density, kinds
        self.scale = float(losses.max()) or 1.0

    def solve(self, goal: np.ndarray) -> np.ndarray | None:
        low, high = 0.0, self.scale
        choice = self._at(goal, low)
        if self._fits(choice):
            return choice
        while not self._fits(choice := self._at(goal, high)):
            if high > 1e12 * self.scale:
                return None
            low, high = high, 4 * high
        for _ in range(40):
            middle = (low + high) / 2
            trial = self._at(goal, middle)
            if self._fits(trial):
                choice, high = trial, middle
            else:
                low = middle
        return choice

    def _fits(self, choice: np.ndarray) -> bool:
        return bool((self.shares[:, choice].mean((1, 2)) <= self.density + 1e-12).all())

    def _at(self, goal: np.ndarray, price: float) -> np.ndarray:
        choices = []
        for layer in goal + price * self.shares.mean(0):
            taken: list[int] = []
            for _ in range(min(self.kinds, layer.shape[1])):
                now = layer[:, taken].min(1) if taken else np.full(layer.shape[0], np.inf)
                total = np.minimum(now[:, None], layer).sum(0)
                taken.append(int(total.argmin()))
            choices.append(np.array(taken)[layer[:, taken].argmin(1)])
        return np.stack(choices)
