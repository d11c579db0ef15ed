"""Perturbed-attention guidance head by head: away from what the model says with blunted heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.hf.tap import Handler, Site
from heedful.registry import register
from heedful.steer.contrastive import ContrastiveLogits
from heedful.steer.intervention import Intervention

Heads = Mapping[int, Sequence[int] | None]


def identity(a: Float[Tensor, "*b n m"], offset: int = 0) -> Float[Tensor, "n m"]:
    """Attention of each query to its own key alone; query i stands at key i + offset."""
    n, m = a.shape[-2:]
    return torch.eye(m, dtype=a.dtype, device=a.device)[offset : offset + n]


def _normalised(a: Float[Tensor, "*b n m"]) -> Float[Tensor, "*b n m"]:
    return a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)


def linear(a: Float[Tensor, "*b n m"], u: float, *, offset: int = 0) -> Float[Tensor, "*b n m"]:
    """A' = (1 - u) A + u I. Source: arXiv 2506.10978."""
    return (1 - u) * a + u * identity(a, offset)


def fisher_rao(a: Float[Tensor, "*b n m"], u: float, *, offset: int = 0) -> Float[Tensor, "*b n m"]:
    """A' = (u I + (1 - u) sqrt(A))^2 by entry, rows normalised. Source: arXiv 2506.10978."""
    return _normalised((u * identity(a, offset) + (1 - u) * a.sqrt()).square())


def slerp(a: Float[Tensor, "*b n m"], u: float, *, offset: int = 0) -> Float[Tensor, "*b n m"]:
    """Along the great circle between square roots, row by row, theta = acos(sqrt(A_ii)).

        A' = (sin(u theta) / sin theta I + sin((1 - u) theta) / sin theta sqrt(A))^2

    Rows with theta < 1e-4 are interpolated linearly. Source: arXiv 2506.10978.
    """
    root, own = a.sqrt(), identity(a, offset)
    theta = (root * own).sum(-1, keepdim=True).clamp(0.0, 1.0).acos()
    near = theta < 1e-4
    theta = theta.masked_fill(near, 1.0)
    to_own, to_a = (u * theta).sin() / theta.sin(), ((1 - u) * theta).sin() / theta.sin()
    return torch.where(near, linear(a, u, offset=offset), (to_own * own + to_a * root).square())


def log_linear(a: Float[Tensor, "*b n m"], u: float, *, offset: int = 0) -> Float[Tensor, "*b n m"]:
    """A' ~ p0^u max(A, 1e-12)^(1 - u), rows normalised; u = 0 gives A, u = 1 gives I.

    p0 = I (1 - e (m - 1)) + e with e = 1e-6. Source: arXiv 2506.10978.
    """
    own, e = identity(a, offset), 1e-6
    if u == 0.0:
        return a
    if u == 1.0:
        return own.expand_as(a).clone()
    p0 = own * (1 - e * (a.shape[-1] - 1)) + e
    return _normalised(p0**u * a.clamp_min(1e-12) ** (1 - u))


def annealed(logits: Float[Tensor, "*b n m"], u: float, *, offset: int = 0) -> Float[Tensor, "*b n m"]:
    """Logits (1 - u) s + u I M, M the maximum of the row; the softmax is still to come.

    A hidden key stays hidden. Source: arXiv 2506.10978, where the released code takes M of the columns.
    """
    hidden = logits == -torch.inf
    seen = logits.masked_fill(hidden, 0.0)
    top = logits.amax(-1, keepdim=True).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return ((1 - u) * seen + u * identity(logits, offset) * top).masked_fill(hidden, -torch.inf)


def image_identity(
    a: Float[Tensor, "b h n n"], image: Bool[Tensor, "b n"], *, text: str = "keep", renormalise: bool = False
) -> Float[Tensor, "b h n n"]:
    """The identity between image tokens alone, for models with one sequence of image and text.

    text         "keep" or "drop": the text columns of image rows
    renormalise  whether the diagonal gets the row's image mass in place of 1
    Rows of text tokens stay. Source: arXiv 2506.10978.
    """
    check_choice("text", text, ("keep", "drop"))
    columns = image[:, None, None]
    mass = (a * columns).sum(-1, keepdim=True) if renormalise else 1.0
    rest = a * ~columns if text == "keep" else torch.zeros_like(a)
    return torch.where(image[:, None, :, None], identity(a) * mass + rest, a)


PATHS: dict[str, Callable[..., Tensor]] = {
    "fisher_rao": fisher_rao,
    "slerp": slerp,
    "log_linear": log_linear,
}


@register("perturbed-heads", kind="steer", paper="headhunter-softpag", tags=("heads", "training-free"))
@dataclass(eq=False)
class PerturbedHeads(Intervention):
    """Moves the attention of chosen heads towards the identity: each token looks at itself.

        out = (1 - u) A V + u V   (SoftPAG; u = 1 is PAG)

    heads  query heads by layer, e.g. {2: [0, 5]}; None for all heads of a layer
    u      0: nothing changes

    Raises ValueError if u is not in [0, 1], or the model lacks a head. Source: arXiv 2506.10978, 2403.17377.
    """

    heads: Heads
    u: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.u <= 1.0:
            raise ValueError(f"u is {self.u!r}, must lie in [0, 1]")

    @property
    def idle(self) -> bool:
        return self.u == 0.0 or not self.heads

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.layer in self.heads

    def chosen(self, site: Site) -> Bool[Tensor, "h 1 1"]:
        """The perturbed heads of a call."""
        heads, count = self.heads[site.layer], site.query.shape[1]
        if heads is not None and not all(0 <= h < count for h in heads):
            raise ValueError(f"heads[{site.layer}] is {list(heads)}, must be below {count}")
        mask = torch.full((count, 1, 1), heads is None, device=site.query.device)
        mask[list(heads or ())] = True
        return mask

    def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        own = site.value[:, :, site.query_positions()]
        own = own.repeat_interleave(output.shape[1] // own.shape[1], dim=1)
        return torch.where(self.chosen(site), (1 - self.u) * output + self.u * own, output)


@register("curved-perturbed-heads", kind="steer", paper="headhunter-softpag", tags=("heads", "training-free"))
@dataclass(eq=False)
class CurvedPerturbedHeads(PerturbedHeads):
    """As `PerturbedHeads`, on another way from A to the identity.

    path  "fisher_rao", "slerp" or "log_linear" (functions of these names), or "annealed": on the logits

    Hidden keys stay hidden. Raises ValueError if path is none of these. Source: arXiv 2506.10978.
    """

    path: str = "slerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("path", self.path, (*PATHS, "annealed"))

    def logits(self, site: Site, logits: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        if self.path != "annealed":
            return logits
        changed = annealed(logits, self.u, offset=int(site.query_positions()[0]))
        return torch.where(self.chosen(site), changed, logits)

    def weights(self, site: Site, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        if self.path == "annealed":
            return weights
        changed = PATHS[self.path](weights, self.u, offset=int(site.query_positions()[0]))
        changed = _normalised(changed * site.visible())
        return torch.where(self.chosen(site), changed, weights)

    def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        return output


@register(
    "perturbed-attention-guidance",
    kind="steer",
    paper="headhunter-softpag",
    tags=("heads", "training-free", "decoding"),
    aliases=("pag", "softpag"),
)
@dataclass(eq=False)
class PerturbedAttentionGuidance(ContrastiveLogits):
    """Logits away from those of a stream whose chosen heads are perturbed.

        z = (1 + w) l - w l(perturbed);   z = -inf where l < log(beta) + max l

    perturbation  what happens to the heads, e.g. PerturbedHeads({2: [0, 5]})
    alpha         the guidance w; 0: nothing changes
    beta          of the cut, which is not in the paper; 0: no token is cut

    For models whose output is an image or a noise: run them once without and once inside the perturbation,
    and join the two with `heedful.steer.contrastive.contrast`. Source: arXiv 2506.10978, 2403.17377.
    """

    perturbation: PerturbedHeads
    alpha: float = 3.0
    beta: float = 0.0
    own_tokens: ClassVar[bool] = False

    @property
    def idle(self) -> bool:
        return super().idle or (self.perturbation.idle and self.beta == 0.0)

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        super().enter(model, stack)
        self.perturbation.reading = self.reading

    def other(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def handlers(self) -> tuple[Handler, ...]:
        return (self.perturbation,)


def by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Pairs (layer, head) as heads by layer."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


@register("headhunter", kind="steer", paper="headhunter-softpag", tags=("heads", "search"))
def head_hunter(
    heads: Iterable[tuple[int, int]],
    objective: Callable[[dict[int, list[int]]], float],
    *,
    rounds: int = 5,
    keep: int = 3,
) -> list[tuple[int, int]]:
    """Greedy search for the heads whose joint perturbation serves an objective best.

    In each round every head that is not chosen yet is tried together with those that are, and the `keep`
    best are added.

    heads      candidates (layer, head)
    objective  of the chosen heads by layer, as `PerturbedHeads` takes them; larger is better

    Gives the heads in the order of their choice. Source: arXiv 2506.10978.
    """
    check_positive("rounds", rounds)
    check_positive("keep", keep)
    left, chosen = list(dict.fromkeys(heads)), list[tuple[int, int]]()
    for _ in range(rounds):
        scores = {head: objective(by_layer([*chosen, head])) for head in left}
        best = sorted(left, key=lambda head: -scores[head])[:keep]
        chosen += best
        left = [head for head in left if head not in best]
    return chosen
