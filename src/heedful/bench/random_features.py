"""What one attention layer can learn when its queries and keys stay as they were drawn.

The layer sees a query vector x_0 and key vectors x_1 ... x_N, weighs the keys by ReLU instead of softmax, and
only its values are trained, which is least squares on random features. It is compared with random features of
a two-layer net on all vectors side by side. Not to be confused with random features that make softmax
attention linear in time.
Source: What can a Single Attention Layer Learn?, arXiv 2307.11353.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.bench.findings import Finding
from heedful.checks import check_positive
from heedful.registry import register

DIM, HEADS, KEYS, SAMPLES = 16, 150, (2, 16), (500, 1500)
HELD_OUT = 1000  # for the choice of the ridge, and again for the test
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)  # relative to the mean square of a row of features
SHIFT = 4.0

Target = Callable[[Float[Tensor, "s d"], Float[Tensor, "s n d"]], Float[Tensor, " s"]]


class Features(Protocol):
    """Random features of a query and its keys; a model is linear in them."""

    def __call__(self, query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, "s f"]: ...


@register("rf-attention-layer", kind="bench", paper="rf-attention-layer", tags=("theory", "random-features"))
class RandomFeatureAttention:
    """The features of an attention layer with frozen queries and keys.

        f(x) = sum_m (1 / N) sum_i ReLU(x~_0^T W_m x~_i) (v_m . x~_i),   x~ = [x; 1]
        features_m = (1 / N) sum_i ReLU(x~_0^T W_m x~_i) x~_i

    dim    of the vectors
    heads  M; there are M (dim + 1) features, and v as many numbers
    shift  0: entries of W ~ N(0, 1/4). Otherwise their mean is shift on the diagonal of the x part, so that
           scores begin with shift x_0 . x_i ("biased"; 4 in the paper)
    """

    def __init__(self, dim: int, *, heads: int, shift: float = 0.0, seed: int = 0) -> None:
        check_positive("dim", dim)
        check_positive("heads", heads)
        generator = torch.Generator().manual_seed(seed)
        self.weight = 0.5 * torch.randn(heads, dim + 1, dim + 1, generator=generator, dtype=torch.float64)
        self.weight[:, :dim, :dim] += shift * torch.eye(dim, dtype=torch.float64)

    def __call__(self, query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, "s f"]:
        query, keys = with_one(query), with_one(keys)
        scores = (torch.einsum("sc,mce->sme", query, self.weight) @ keys.mT).relu()
        return (scores @ keys / keys.shape[1]).flatten(1)


class RandomFeatureMLP:
    """ReLU(W [x_0; x_1; ...; x_N; 1]), entries of W ~ N(0, 1/4): the features of a two-layer net."""

    def __init__(self, dim: int, *, keys: int, features: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = (keys + 1) * dim + 1
        self.weight = 0.5 * torch.randn(width, features, generator=generator, dtype=torch.float64)

    def __call__(self, query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, "s f"]:
        return (with_one(torch.cat([query, keys.flatten(1)], dim=1)) @ self.weight).relu()


def with_one(x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d1"]:
    """x~ = [x; 1]."""
    return F.pad(x, (0, 1), value=1.0)


def fit(
    features: Float[Tensor, "s f"], y: Float[Tensor, "s t"], ridges: Sequence[float]
) -> list[Float[Tensor, "f t"]]:
    """For each ridge the v that minimises ||features v - y||^2 + lambda ||v||^2, for t targets at once.

    lambda is the ridge times the mean of ||row of features||^2.
    """
    size = features.square().sum(1).mean()
    dual = features.shape[0] <= features.shape[1]  # the smaller of two equal forms
    gram = features @ features.T if dual else features.T @ features
    right = y if dual else features.T @ y
    found = []
    for ridge in ridges:
        v = torch.linalg.solve(gram + ridge * size * torch.eye(len(gram), dtype=y.dtype), right)
        found.append(features.T @ v if dual else v)
    return found


# -- what is to be learned: averages over the keys, in which their order plays no part ----------------


def square_of_keys(query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, " s"]:
    """mean_i (beta . x_i)^2, with beta the first axis."""
    return keys[..., 0].square().mean(1)


def square_of_products(query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, " s"]:
    """mean_i (x_0 . x_i)^2."""
    return (keys @ query[..., None])[..., 0].square().mean(1)


def weighted_keys(query: Float[Tensor, "s d"], keys: Float[Tensor, "s n d"]) -> Float[Tensor, " s"]:
    """mean_i (x_0 . x_i) (beta . x_i), with beta the first axis."""
    return ((keys @ query[..., None])[..., 0] * keys[..., 0]).mean(1)


TARGETS: dict[str, Target] = {
    "(b.xi)^2": square_of_keys,
    "(x0.xi)^2": square_of_products,
    "(x0.xi)(b.xi)": weighted_keys,
}


# -- the experiment ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Square errors on unseen data, relative to those of the mean, of the three kinds of features."""

    target: str
    keys: int
    samples: int
    attention: float
    biased: float
    mlp: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    points: list[Point]
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        return {
            "points": [x.as_dict() for x in self.points],
            "findings": [x.as_dict() for x in self.findings],
        }


def experiment(
    *,
    dim: int = DIM,
    heads: int = HEADS,
    keys: Sequence[int] = KEYS,
    samples: Sequence[int] = SAMPLES,
    seed: int = 0,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Report:
    """Fit the three kinds of features to every target, for each number of keys and of samples.

    All have heads (dim + 1) features. Vectors are uniform on the unit sphere. Raises ValueError on sizes
    below 1.
    """
    for name, values in (("dim", (dim,)), ("heads", (heads,)), ("keys", keys), ("samples", samples)):
        for value in values:
            check_positive(name, value)
    points = []
    for n in keys:
        made: dict[str, Features] = {
            "attention": RandomFeatureAttention(dim, heads=heads, seed=seed),
            "biased": RandomFeatureAttention(dim, heads=heads, shift=SHIFT, seed=seed),
            "mlp": RandomFeatureMLP(dim, keys=n, features=heads * (dim + 1), seed=seed),
        }
        generator = torch.Generator().manual_seed(seed + 1)
        vectors = torch.randn(
            max(samples) + 2 * HELD_OUT, n + 1, dim, generator=generator, dtype=torch.float64
        )
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        query, others = vectors[:, 0], vectors[:, 1:]
        y = torch.stack([function(query, others) for function in TARGETS.values()], dim=1)
        y = (y - y.mean(0)) / y.std(0)
        rows = {name: features(query, others) for name, features in made.items()}
        for count in samples:
            errors = {name: _errors(f, y, count) for name, f in rows.items()}
            for i, target in enumerate(TARGETS):
                points.append(Point(target, n, count, **{name: e[i] for name, e in errors.items()}))
                on_point(points[-1])
    return Report(points, _findings(points))


def _errors(features: Float[Tensor, "s f"], y: Float[Tensor, "s t"], count: int) -> list[float]:
    """Errors on the last rows of a fit to the first ones, with the ridge that the rows between prefer."""
    found = torch.stack(fit(features[:count], y[:count], RIDGES))
    error = (features[-2 * HELD_OUT :] @ found - y[-2 * HELD_OUT :]).square()
    choice, test = error[:, :HELD_OUT].mean(1), error[:, HELD_OUT:].mean(1)
    return test.gather(0, choice.argmin(0, keepdim=True))[0].tolist()


def _findings(points: list[Point]) -> list[Finding]:
    """The patterns at the largest number of samples."""
    most = max(p.samples for p in points)
    fewest, several = min(p.keys for p in points), max(p.keys for p in points)
    at = {(p.target, p.keys): p for p in points if p.samples == most}
    keys, *products = TARGETS
    few, many = at[keys, fewest], at[keys, several]
    found = [
        Finding.below(
            f"{keys}, {several} keys: error of attention, relative to that of the two-layer net",
            many.attention / many.mlp,
            0.5,
        )
    ]
    if several > fewest:
        change = f"{keys}: error with {several} keys, relative to that with {fewest}, of"
        found += [
            Finding.below(f"{change} attention", many.attention / few.attention, 1.5),
            Finding.above(f"{change} the two-layer net", many.mlp / few.mlp, 1.5),
        ]
    for target in products:
        point = at[target, several]
        name = f"{target}, {several} keys: error of biased attention, relative to that without the bias"
        found.append(Finding.below(name, point.biased / point.attention, 0.8))
    return found
