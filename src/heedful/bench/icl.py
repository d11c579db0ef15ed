"""In-context linear regression: what one layer of softmax attention learns from pairs (x, y).

A prompt holds `length` pairs with y = beta . x + noise, and a query x whose y is asked. Attention layers
without feed-forward nets are trained on such prompts, each with a beta of its own. One layer comes out as a
step of gradient descent on the prompt's least squares, with the mean of x taken out where two heads share the
work; several layers do better.
Source: In-Context Linear Regression Demystified, arXiv 2503.12734.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.bench.findings import Finding
from heedful.checks import check_choice, check_positive
from heedful.registry import register

BATCH, LEARNING_RATE = 128, 0.05
STARTS = ("random", "small-identity", "small-identity-qk", "opposite-small-identity")
SMALL, SMALL_QK = 1e-6, 1e-4  # sizes of prepared starts
DEEP_RATE, EPS = 0.01, 1e-20  # of Adam
SHARPER = 0.2  # how much better several layers must be for the pattern to hold
TEST_PROMPTS, TEST_SEED = 20000, 987654321  # training seeds are small numbers

OnStep = Callable[[tuple[int, int], int, int, float], None]  # (layers, heads), start, step, loss


@dataclass(frozen=True)
class LinearRegression:
    """Prompts: x ~ N(0, S), beta ~ N(0, I / dim), y = beta . x + N(0, noise).

    dim: of x; length: pairs in a prompt; noise: a variance; correlation: rho, in [0, 1), with
    S_ij = rho^|i - j|. Raises ValueError on other values.
    """

    dim: int = 5
    length: int = 40
    noise: float = 0.1
    correlation: float = 0.0

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        check_positive("length", self.length)
        if not self.noise >= 0:
            raise ValueError(f"noise is {self.noise}, must be at least 0")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation is {self.correlation}, must be at least 0 and below 1")

    def covariance(self) -> Float[Tensor, "d d"]:
        """S."""
        place = torch.arange(self.dim)
        return self.correlation ** (place[:, None] - place).abs().float()

    def prompts(
        self, batch: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b l d1"], Float[Tensor, "b 1 d1"], Float[Tensor, " b"]]:
        """Pairs [x, y], queries [x, 0], and the y that is asked."""
        x = torch.randn(batch, self.length + 1, self.dim, generator=generator)
        if self.correlation:
            x = x @ torch.linalg.cholesky(self.covariance()).mT
        beta = torch.randn(batch, self.dim, generator=generator) / self.dim**0.5
        y = (x @ beta[..., None])[..., 0]
        y = y + self.noise**0.5 * torch.randn(y.shape, generator=generator)
        z = torch.cat([x, y[..., None]], dim=-1)
        query = torch.cat([x[:, -1:], torch.zeros(batch, 1, 1)], dim=-1)
        return z[:, :-1], query, y[:, -1]


@register(
    "icl-linear-attention",
    kind="bench",
    paper="icl-linear-attention",
    tags=("theory", "softmax", "in-context"),
)
class ICLAttention(nn.Module):
    """One layer of softmax attention from a query to the pairs of a prompt, each head as wide as a pair.

        f = sum_h O_h V_h Z softmax(Z^T K_h^T Q_h z_q / sqrt(D))

    dim: D, of a pair; heads; out: numbers that are asked. No biases, no positions. hidden: pairs that a query
    does not see.
    """

    def __init__(self, dim: int, *, heads: int, out: int = 1) -> None:
        super().__init__()
        check_positive("heads", heads)
        self.heads = heads
        self.query = nn.Linear(dim, heads * dim, bias=False)
        self.key = nn.Linear(dim, heads * dim, bias=False)
        self.value = nn.Linear(dim, heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, out, bias=False)

    def forward(
        self,
        query: Float[Tensor, "b n c"],
        pairs: Float[Tensor, "b l c"],
        *,
        hidden: Bool[Tensor, "n l"] | None = None,
    ) -> Float[Tensor, "b n o"]:
        q, k, v = (
            rearrange(y, "b n (h c) -> b h n c", h=self.heads)
            for y in (self.query(query), self.key(pairs), self.value(pairs))
        )
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        weights = logits.softmax(-1)
        return self.out(rearrange(weights @ v, "b h n c -> b n (h c)"))

    def circuits(self) -> tuple[Float[Tensor, "h c c"], Float[Tensor, "h o c"]]:
        """W_Q^T W_K / sqrt(D), from query to pair, and W_O W_V, from pair to output, of each head."""
        query, key, value = (
            rearrange(layer.weight, "(h e) c -> h e c", h=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        out = rearrange(self.out.weight, "o (h e) -> h o e", h=self.heads)
        return query.mT @ key * query.shape[-1] ** -0.5, out @ value


class ICLLayers(nn.Module):
    """Several such layers with residuals over pairs and query together, causal.

        Z_0 = [pairs, query];   Z_k = Z_{k-1} + layer_k(Z_{k-1});   f = the y of the query in the last Z

    Each position attends to those up to itself. dim, heads: see `ICLAttention`; layers: their number.
    """

    def __init__(self, dim: int, *, heads: int, layers: int) -> None:
        super().__init__()
        check_positive("layers", layers)
        self.layers = nn.ModuleList(ICLAttention(dim, heads=heads, out=dim) for _ in range(layers))

    def forward(self, query: Float[Tensor, "b 1 c"], pairs: Float[Tensor, "b l c"]) -> Float[Tensor, "b 1 1"]:
        z = torch.cat([pairs, query], dim=1)
        hidden = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool, device=z.device).triu(1)
        for layer in self.layers:
            z = z + layer(z, z, hidden=hidden)
        return z[:, -1:, -1:]


@torch.no_grad()
def prepare(layer: ICLAttention, start: str) -> None:
    """Set the weights of a layer of one output to a start that is named in `STARTS`.

    "random"                   as they are
    "small-identity"           identities times 1e-6 in place of queries, keys and values; the output takes y
    "small-identity-qk"        identities times 1e-4 in place of queries and keys; the rest random
    "opposite-small-identity"  as "small-identity", and the queries of the second half of the heads negative

    Two classes of the authors differ in the last: here queries alone change their sign, so that the heads
    look for opposite x; negative keys as well would undo it. What stands for an identity in one output is
    ours.
    """
    check_choice("start", start, STARTS)
    if start == "opposite-small-identity" and layer.heads % 2:
        raise ValueError(f"heads is {layer.heads}, must be even where half of them begin opposite")
    if start == "random":
        return
    size = SMALL_QK if start == "small-identity-qk" else SMALL
    width = layer.query.weight.shape[1]
    eye = torch.eye(width).repeat(layer.heads, 1)
    layer.query.weight.copy_(size * eye)
    layer.key.weight.copy_(size * eye)
    if start == "small-identity-qk":
        return
    layer.value.weight.copy_(size * eye)
    layer.out.weight.copy_(size * eye.mT[-1:])
    if start == "opposite-small-identity":
        layer.query.weight[layer.heads // 2 * width :].neg_()


# -- what the layer is compared with -------------------------------------------------------------------


def softmax_estimate(
    x: Float[Tensor, "*b l d"],
    y: Float[Tensor, "*b l"],
    x_query: Float[Tensor, "*b d"],
    omega: Float[Tensor, " h"],
    mu: Float[Tensor, " h"],
) -> Float[Tensor, "*b"]:
    """The layer with two numbers a head: sum_h mu_h sum_l y_l softmax_l(omega_h x_l . x_query)."""
    products = (x @ x_query[..., None])[..., 0]
    weights = (omega[:, None] * products[..., None, :]).softmax(-1)
    return (weights @ y[..., None])[..., 0] @ mu


def gradient_step(
    x: Float[Tensor, "*b l d"],
    y: Float[Tensor, "*b l"],
    x_query: Float[Tensor, "*b d"],
    *,
    rate: float,
    debiased: bool = False,
) -> Float[Tensor, "*b"]:
    """One step from beta = 0: rate / L sum_l y_l x_l . x_query, with the mean of x taken out if debiased.

    Heads (omega, mu) and (-omega, -mu) tend to it as omega becomes small, with rate = 2 omega mu.
    """
    if debiased:
        x = x - x.mean(-2, keepdim=True)
    return rate / x.shape[-2] * ((x @ x_query[..., None])[..., 0] * y).sum(-1)


def ridge(
    x: Float[Tensor, "*b l d"], y: Float[Tensor, "*b l"], x_query: Float[Tensor, "*b d"], *, noise: float
) -> Float[Tensor, "*b"]:
    """The best estimate there is: x_query . (sum x x^T + noise d I)^-1 sum x y."""
    d = x.shape[-1]
    gram = x.mT @ x + noise * d * torch.eye(d, dtype=x.dtype, device=x.device)
    return (x_query * torch.linalg.solve(gram, (x.mT @ y[..., None])[..., 0])).sum(-1)


def ridge_risk(noise: float, ratio: float) -> float:
    """Expected square error of ridge, noise of the asked y included, for large d and L with d / L = ratio."""
    root = math.sqrt(4 * noise + (noise + (1 - ratio) / ratio) ** 2)
    return 0.5 * (noise + (ratio - 1) / ratio + root)


def optimal_mu(omega: Float[Tensor, " h"], task: LinearRegression) -> Float[Tensor, " h"]:
    """The mu that minimises `approximate_loss` for these omega."""
    return torch.linalg.solve(_curvature(omega, task), omega)


def approximate_loss(
    omega: Float[Tensor, " h"], mu: Float[Tensor, " h"], task: LinearRegression
) -> Float[Tensor, ""]:
    """Expected square error of `softmax_estimate` for many pairs.

    1 + s - 2 mu . omega + mu^T (omega omega^T + (1 + s) / L exp(d omega omega^T)) mu,   s: the noise
    """
    return 1 + task.noise - 2 * mu @ omega + mu @ _curvature(omega, task) @ mu


def _curvature(omega: Tensor, task: LinearRegression) -> Tensor:
    outer = torch.outer(omega, omega)
    return outer + (1 + task.noise) / task.length * (task.dim * outer).exp()


# -- the experiment ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What a trained layer became.

    layers         how many; of several no pattern is read off: omega and mu are empty, what follows is None
    loss           square error on unseen prompts; loss_longer: with twice as many pairs
    by_length      square errors on prompts of other lengths
    omega, mu      the two numbers of each head
    off_identity   largest entry of the heads' query-key matrices off the diagonal, of the x part, relative to
                   the largest |omega|; heads that give nothing (|mu| small) aside
    y_in_keys      largest entry from x to y there, likewise
    x_in_values    largest entry of the heads' output-value vectors at x, relative to the largest |mu|
    """

    heads: int
    layers: int
    loss: float
    loss_longer: float
    by_length: dict[int, float]
    omega: list[float]
    mu: list[float]
    off_identity: float | None
    y_in_keys: float | None
    x_in_values: float | None

    @property
    def mu_balance(self) -> float | None:
        """|sum mu| / sum |mu|: 0 where heads of both signs weigh the same."""
        return abs(sum(self.mu)) / sum(map(abs, self.mu)) if self.mu else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mu_balance": self.mu_balance}


@dataclass(frozen=True)
class Report:
    """Trained layers, the errors of the estimators on the same prompts, and the patterns.

    by_length: the errors of the estimators on prompts of other lengths
    """

    learned: list[Learned]
    estimators: dict[str, float]
    by_length: dict[int, dict[str, float]]
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        return {
            "learned": [x.as_dict() for x in self.learned],
            "estimators": self.estimators,
            "by_length": self.by_length,
            "findings": [x.as_dict() for x in self.findings],
        }


def experiment(
    *,
    heads: Sequence[int] = (1, 2, 4),
    layers: Sequence[int] = (1,),
    steps: int = 2000,
    starts: int = 2,
    start: str = "random",
    lengths: Sequence[int] = (),
    seed: int = 0,
    task: LinearRegression | None = None,
    on_step: OnStep = lambda network, start, step, loss: None,
) -> Report:
    """Train networks with each number of heads and of layers, keep the best start, read off the patterns.

    starts   how many seeds of weights and prompts each network has
    start    where one layer begins, see `prepare`; several layers begin at random
    lengths  of further prompts, on which what was trained is tested

    Raises ValueError unless all numbers are at least 1, on an unknown start, and on a prepared start of
    several layers.
    """
    task = LinearRegression() if task is None else task
    counts = [("heads", heads), ("layers", layers), ("lengths", lengths)]
    for name, values in (("steps", [steps]), ("starts", [starts]), *counts):
        for value in values:
            check_positive(name, value)
    check_choice("start", start, STARTS)
    if start != "random" and max(layers) > 1:
        raise ValueError(f"start is {start!r}, must be 'random' with several layers")
    learned = []
    for depth in layers:
        for h in heads:
            runs = []
            for run in range(starts):

                def told(
                    step: int, loss: float, network: tuple[int, int] = (depth, h), run: int = run
                ) -> None:
                    on_step(network, run, step, loss)

                model = _train(task, (depth, h), steps, start, seed * 1000 + run, told)
                runs.append(_measure(model, task, lengths))
            learned.append(min(runs, key=lambda run: run.loss))
    estimators = _estimators(task)
    others = {length: _estimators(replace(task, length=length)) for length in lengths}
    if start == "small-identity":
        return Report(learned, estimators, others, _alike(learned))
    return Report(learned, estimators, others, _findings(learned, estimators, task.correlation))


def _train(
    task: LinearRegression,
    network: tuple[int, int],
    steps: int,
    start: str,
    seed: int,
    told: Callable[[int, float], None],
) -> ICLAttention | ICLLayers:
    """Adam with a cosine decay to zero."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads = network
    model: ICLAttention | ICLLayers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if layers == 1:
            model = ICLAttention(task.dim + 1, heads=heads)
            prepare(model, start)
        else:
            model = ICLLayers(task.dim + 1, heads=heads, layers=layers)
    # Deep in a small start gradients are far below Adam's usual eps.
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE if layers == 1 else DEEP_RATE, eps=EPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pairs, query, asked = task.prompts(BATCH, generator)
        loss = (model(query, pairs)[:, 0, 0] - asked).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        told(step + 1, float(loss.detach()))
    return model


@torch.no_grad()
def _measure(model: ICLAttention | ICLLayers, task: LinearRegression, lengths: Sequence[int] = ()) -> Learned:
    longer = replace(task, length=2 * task.length)
    losses: dict[str, Any] = {
        "loss": _test_loss(model, task),
        "loss_longer": _test_loss(model, longer),
        "by_length": {length: _test_loss(model, replace(task, length=length)) for length in lengths},
    }
    if isinstance(model, ICLLayers):
        layers: Any = model.layers
        return Learned(
            layers[0].heads,
            len(layers),
            **losses,
            omega=[],
            mu=[],
            off_identity=None,
            y_in_keys=None,
            x_in_values=None,
        )
    query_key, output_value = model.circuits()
    d = task.dim
    mu = output_value[:, 0, d]
    # The last row meets the zero in place of the query's y, so it is never trained.
    block, to_y = query_key[:, :d, :d], query_key[:, :d, d]
    omega = block.diagonal(dim1=-2, dim2=-1).mean(-1)
    live = mu.abs() > 0.1 * mu.abs().max()
    off = block - torch.diag_embed(omega[:, None].expand(-1, d))
    size = omega[live].abs().max()
    return Learned(
        heads=model.heads,
        layers=1,
        **losses,
        omega=omega.tolist(),
        mu=mu.tolist(),
        off_identity=float(off[live].abs().max() / size),
        y_in_keys=float(to_y[live].abs().max() / size),
        x_in_values=float(output_value[:, 0, :d].abs().max() / mu.abs().max()),
    )


def _test_loss(model: ICLAttention | ICLLayers, task: LinearRegression) -> float:
    pairs, query, asked = task.prompts(TEST_PROMPTS, torch.Generator().manual_seed(TEST_SEED))
    return float((model(query, pairs)[:, 0, 0] - asked).square().mean())


@torch.no_grad()
def _estimators(task: LinearRegression) -> dict[str, float]:
    """Square errors on the prompts of the test; of gradient steps with the best rate; and `ridge_risk`."""
    pairs, query, asked = task.prompts(TEST_PROMPTS, torch.Generator().manual_seed(TEST_SEED))
    given = (pairs[..., : task.dim], pairs[..., task.dim], query[:, 0, : task.dim])
    found = {"nothing": torch.zeros_like(asked)}
    for name, debiased in (("gradient step", False), ("debiased gradient step", True)):
        unit = gradient_step(*given, rate=1.0, debiased=debiased)
        found[name] = (unit @ asked) / (unit @ unit) * unit
    found["ridge"] = ridge(*given, noise=task.noise)
    errors = {name: float((f - asked).square().mean()) for name, f in found.items()}
    if not task.correlation:  # the formula is of independent x
        errors["ridge, by its formula"] = ridge_risk(task.noise, task.dim / task.length)
    return errors


def _measured(x: Learned) -> tuple[float, float, float, float]:
    """The patterns of one layer."""
    assert x.off_identity is not None and x.y_in_keys is not None
    assert x.x_in_values is not None and x.mu_balance is not None
    return x.off_identity, x.y_in_keys, x.x_in_values, x.mu_balance


def _alike(learned: list[Learned]) -> list[Finding]:
    """Heads with the same weights have the same gradients."""
    found = []
    for x in (x for x in learned if x.heads > 1):
        spread = (max(x.omega) - min(x.omega)) / max(map(abs, x.omega))
        found.append(
            Finding.below(f"{x.heads} heads that begin alike: spread of omega / |omega|", spread, 0.01)
        )
        for one in (y for y in learned if y.heads == 1):
            name = f"{x.heads} heads that begin alike: |1 - error / that of 1 head|"
            found.append(Finding.below(name, abs(1 - x.loss / one.loss), 0.05))
    return found


def _findings(
    learned: list[Learned], estimators: dict[str, float], correlation: float = 0.0
) -> list[Finding]:
    shallow = [x for x in learned if x.layers == 1]
    several = [x for x in shallow if x.heads > 1]
    found = []
    for x in several:
        name = f"{x.heads} heads:"
        off_identity, y_in_keys, x_in_values, balance = _measured(x)
        if x.heads == 2:  # of more heads some may give little, and what they look at is then left open
            if not correlation:  # the paper states it of independent x
                of_identity = "query-key matrices of x are multiples of the identity"
                found.append(Finding.below(f"{name} {of_identity}", off_identity, 0.2))
            found += [
                Finding.below(f"{name} keys do not look at y", y_in_keys, 0.2),
                Finding.below(f"{name} values hold y alone", x_in_values, 0.1),
            ]
        step = x.loss / estimators["debiased gradient step"]
        longer = x.loss_longer / x.loss
        found += [
            Finding.above(f"{name} heads of both signs of omega", float(min(x.omega) < 0 < max(x.omega)), 0),
            Finding.below(f"{name} mu adds up to nothing: |sum| / sum of |mu|", balance, 0.05),
            Finding.below(f"{name} error / that of a debiased gradient step", step, 1.05),
            Finding.below(f"{name} error with twice the pairs / with as many as in training", longer, 0.9),
        ]
    one = next((x for x in shallow if x.heads == 1), None)
    if one and several:
        ratio = one.loss / several[0].loss
        found.append(Finding.above(f"1 head: error / that of {several[0].heads} heads", ratio, 1.3))
    if len(several) > 1:
        ratio = several[0].loss / several[-1].loss
        name = f"{several[0].heads} heads: error / that of {several[-1].heads} heads"
        found.append(Finding.below(name, ratio, 1.03))
    for x in (x for x in learned if x.layers > 1):
        for alone in (y for y in shallow if y.heads == x.heads):
            name = f"{x.layers} layers of {x.heads} heads: error / that of one layer"
            found.append(Finding.below(name, x.loss / alone.loss, 1 - SHARPER))
    return found
