"""A classifier that shows what it compares: votes of training images, matched cell by cell, under a mask that
can be edited.

Source: CHM-Corr++, arXiv 2404.05238.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register


def nearest_cells(
    source: Float[Tensor, "k c g g"], target: Float[Tensor, "k c g g"]
) -> Int[Tensor, "k cells 2"]:
    """For each cell of the source, row by row, the (row, column) of the target's cell of the highest cosine.

    Of equals the first. Ours, where no network for correspondences is at hand.
    """
    g = source.shape[-1]
    one, other = (F.normalize(x.flatten(2), dim=1) for x in (source, target))
    cosine = one.mT @ other
    # The first of equals: argmax does not promise it.
    place = (cosine == cosine.amax(-1, keepdim=True)).int().cumsum(-1).eq(0).sum(-1)
    return torch.stack([place // g, place % g], -1)


def cells_of_points(points: Float[Tensor, "k cells 2"], grid: int = 7) -> Int[Tensor, "k cells 2"]:
    """The (row, column) of points (x, y) in [-1, 1], such as a matching network gives them.

    row = int((y + 1) / 2 * grid),   column = int((x + 1) / 2 * grid),   at most grid - 1
    """
    check_positive("grid", grid)
    if not (points.abs() <= 1).all():
        raise ValueError("points must lie in [-1, 1]")
    return ((points + 1) / 2 * grid).long().clamp(max=grid - 1).flip(-1)


def cell_similarity(
    source: Float[Tensor, "k c g g"], target: Float[Tensor, "k c g g"], cells: Int[Tensor, "k cells 2"]
) -> Float[Tensor, "k g g"]:
    """The cosine of each cell of the source with its match in the target.

    cells  (row, column) of the match of each cell of the source, which go row by row
    """
    g = source.shape[-1]
    place = cells[..., 0] * g + cells[..., 1]
    matched = target.flatten(2).gather(2, place[:, None].expand(-1, target.shape[1], -1))
    return F.cosine_similarity(source.flatten(2), matched, dim=1, eps=1e-6).unflatten(1, (g, g))


def cross_correlation_map(
    source: Float[Tensor, "k c g g"], target: Float[Tensor, "k c g g"]
) -> Float[Tensor, "k g g"]:
    """How much each cell of the source is like the target as a whole.

        map_z = sum_y a_z . b_y,   a = P / (cells |mean_z P_z|),   b = Q / (cells |mean_y Q_y|)

    with P and Q the cells of source and target.
    """
    g = source.shape[-1]
    p, q = source.flatten(2), target.flatten(2)
    a, b = (x / (g * g * x.mean(2).norm(dim=1)[:, None, None]).clamp_min(1e-12) for x in (p, q))
    return torch.einsum("kcz,kc->kz", a, b.sum(2)).unflatten(1, (g, g))


@dataclass(frozen=True, eq=False)
class CorrespondenceVerdict:
    """What was decided, and what it rests on; neighbours go from the best to the worst.

    prediction  the label that most of the voters have; of equals the smallest
    votes       how many voters have it: the confidence
    voters      how many neighbours voted
    top         how many cells of the automatic mask make a score
    neighbours  their places in the training set
    labels      of the neighbours
    scores      by which they are ranked
    similarity  of each of the query's cells to its match
    cells       (row, column) of the matches, for the query's cells row by row
    masks       the cells that counted, one map a neighbour
    automatic   what the masks are without a user's
    """

    prediction: int
    votes: int
    voters: int
    top: int
    neighbours: Int[Tensor, " k"]
    labels: Int[Tensor, " k"]
    scores: Float[Tensor, " k"]
    similarity: Float[Tensor, "k g g"]
    cells: Int[Tensor, "k cells 2"]
    masks: Bool[Tensor, "k g g"]
    automatic: Bool[Tensor, "k g g"]


@register(
    "chm-corr-plus",
    kind="inspect",
    paper="chm-corr-plus",
    aliases=("correspondence-classifier",),
    tags=("image", "classifier"),
)
class CorrespondenceClassifier:
    """The training images nearest to a query, ranked anew by how well they match it cell by cell, vote.

        s_ij = cos(cell ij of the query, its match in the image)
        score = mean of the `top` largest of s * [cc >= threshold],   cc = `cross_correlation_map` from 0 to 1
        score = mean over all cells of s * mask,                      where a mask is given

    maps        (n, c, g, g): the last map of a backbone for each training image, or the patch tokens of a ViT
                on their grid
    labels      (n)
    neighbours  how many images are compared, the nearest by the cosine of their mean cell; at most n
    votes       how many of them vote, the highest scores; at most `neighbours`

    Call it with the map of a query (c, g, g). `mask` (g, g) says which of its cells count; one without any is
    as none. `cells` (k, g * g, 2) are the matches in the images that `nearest(query)` gives, in that order,
    such as those of a matching network (`cells_of_points`); by default `nearest_cells`.

    People who edit the mask see what the decision rests on; the authors' study found that their accuracy did
    not rise by it. ValueError where shapes do not fit.
    Source: CHM-Corr++, arXiv 2404.05238.
    """

    def __init__(
        self,
        maps: Float[Tensor, "n c g g"],
        labels: Int[Tensor, " n"],
        *,
        neighbours: int = 50,
        votes: int = 20,
        threshold: float = 0.55,
        top: int = 5,
    ) -> None:
        check_positive("neighbours", neighbours)
        check_positive("votes", votes)
        check_positive("top", top)
        if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or 0 in maps.shape:
            raise ValueError(f"maps have shape {tuple(maps.shape)}, must be (n, c, g, g)")
        if labels.shape != maps.shape[:1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, must be ({len(maps)},)")
        if top > maps.shape[2] ** 2:
            raise ValueError(f"top is {top}, must be at most {maps.shape[2] ** 2}, the number of cells")
        self.maps, self.labels = maps, labels
        self.neighbours, self.votes, self.threshold, self.top = neighbours, votes, threshold, top

    def nearest(self, query: Float[Tensor, "c g g"]) -> Int[Tensor, " k"]:
        """The training images nearest to a query, the nearest first."""
        if query.shape != self.maps.shape[1:]:
            raise ValueError(
                f"query has shape {tuple(query.shape)}, must be {tuple(self.maps.shape[1:])} as the maps"
            )
        pooled = self.maps.mean((2, 3))
        cosine = F.cosine_similarity(query.mean((1, 2))[None], pooled)
        return cosine.argsort(descending=True, stable=True)[: self.neighbours]

    @torch.no_grad()
    def __call__(
        self,
        query: Float[Tensor, "c g g"],
        *,
        mask: Bool[Tensor, "g g"] | None = None,
        cells: Int[Tensor, "k cells 2"] | None = None,
    ) -> CorrespondenceVerdict:
        # 1. The nearest images.
        near = self.nearest(query)
        target = self.maps[near]
        source = query.expand_as(target)
        # 2. Which cell of each image goes with which cell of the query.
        if cells is None:
            cells = nearest_cells(source, target)
        self._check(mask, cells, len(near))
        # 3. How well they match.
        similarity = cell_similarity(source, target, cells)
        # 4. The cells that count.
        automatic = attended_cells(cross_correlation_map(source, target), self.threshold)
        # 5. One number an image.
        if mask is None or not mask.any():
            masks = automatic
            scores = (similarity * masks).flatten(1).topk(self.top).values.mean(1)
        else:
            masks = mask.expand_as(automatic)
            scores = (similarity * masks).mean((1, 2))
        # 6. The best vote.
        order = scores.argsort(descending=True, stable=True)
        prediction, votes = vote(scores, self.labels[near], self.votes)
        return CorrespondenceVerdict(
            prediction,
            votes,
            min(self.votes, len(near)),
            self.top,
            *(x[order] for x in (near, self.labels[near], scores, similarity, cells, masks, automatic)),
        )

    def _check(self, mask: Tensor | None, cells: Tensor, k: int) -> None:
        g = self.maps.shape[-1]
        if mask is not None and (mask.shape != (g, g) or mask.dtype != torch.bool):
            raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}, must be ({g}, {g}) torch.bool")
        if cells.shape != (k, g * g, 2) or not ((cells >= 0) & (cells < g)).all():
            raise ValueError(
                f"cells have shape {tuple(cells.shape)}, must be ({k}, {g * g}, 2) of numbers below {g}"
            )


def attended_cells(maps: Float[Tensor, "k g g"], threshold: float = 0.55) -> Bool[Tensor, "k g g"]:
    """Where each map, scaled to [0, 1], is at least the threshold; everywhere where it is flat."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return maps - low >= threshold * (high - low)


def vote(scores: Float[Tensor, " k"], labels: Int[Tensor, " k"], voters: int) -> tuple[int, int]:
    """The most frequent label among the `voters` highest scores, the smallest of equals, and its number."""
    best = scores.argsort(descending=True, stable=True)[:voters]
    found, counts = labels[best].unique(return_counts=True)
    most = counts.amax()
    return int(found[counts == most][0]), int(most)
