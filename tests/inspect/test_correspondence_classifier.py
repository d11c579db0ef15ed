"""Each step against a transcription in loops, and the whole on handwritten digits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from heedful.inspect import (
    CorrespondenceClassifier,
    cell_similarity,
    cells_of_points,
    cross_correlation_map,
    nearest_cells,
)

G = 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x, y):
    return float(sum(x * y)) / math.sqrt(float(sum(x * x)) * float(sum(y * y)))


def by_steps(maps, labels, query, *, neighbours, votes, threshold, top, mask=None):
    """(prediction, votes, neighbours, scores): the numbered steps, image by image and cell by cell."""
    pooled = [cosine(query.mean((1, 2)), x.mean((1, 2))) for x in maps]
    near = sorted(range(len(maps)), key=lambda k: -pooled[k])[:neighbours]
    places = [(i, j) for i in range(G) for j in range(G)]
    scores = {}
    for k in near:
        other = maps[k]
        match = {(i, j): max(cosine(query[:, i, j], other[:, a, b]) for a, b in places) for i, j in places}
        a, b = (x / (x.mean((1, 2)).norm() * G * G) for x in (query, other))
        cc = {(i, j): sum(float(sum(a[:, i, j] * b[:, y, x])) for y, x in places) for i, j in places}
        low, high = min(cc.values()), max(cc.values())
        if mask is None:
            kept = [match[p] if (cc[p] - low) / (high - low) >= threshold else 0.0 for p in places]
            scores[k] = sum(sorted(kept)[-top:]) / top
        else:
            scores[k] = sum(match[p] for p in places if mask[p]) / (G * G)
    best = sorted(near, key=lambda k: -scores[k])
    count = Counter(labels[k].item() for k in best[:votes])
    prediction = min(count, key=lambda label: (-count[label], label))
    return prediction, count[prediction], best, [scores[k] for k in best]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
def test_by_steps(seed, masked):
    maps, query = drawn(20, 5, G, G, seed=seed), drawn(5, G, G, seed=50 + seed) + 0.3
    labels = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(seed))
    mask = drawn(G, G, seed=seed) > 0 if masked else None
    options = {"neighbours": 12, "votes": 6, "threshold": 0.4, "top": 3}
    found = CorrespondenceClassifier(maps, labels, **options)(query, mask=mask)
    prediction, votes, best, scores = by_steps(maps, labels, query, **options, mask=mask)
    assert (found.prediction, found.votes, found.voters) == (prediction, votes, 6)
    assert found.neighbours.tolist() == best and found.labels.tolist() == labels[best].tolist()
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-9)  # eps 1e-6 is below rounding
    for row, k in enumerate(best):
        for z in range(G * G):
            i, j = found.cells[row, z].tolist()
            wanted = cosine(query[:, z // G, z % G], maps[k, :, i, j])
            assert found.similarity[row, z // G, z % G].item() == pytest.approx(wanted)
    assert torch.equal(found.masks, mask.expand(12, G, G) if masked else found.automatic)


def test_matches_of_ones_own():
    """Each cell matches itself, or where another network says; all cells count where a map is flat."""
    source = drawn(2, 5, G, G)
    own = torch.stack(torch.meshgrid(torch.arange(G), torch.arange(G), indexing="ij"), -1).reshape(-1, 2)
    assert torch.equal(nearest_cells(source, source), own.expand(2, -1, -1))
    turned = torch.rot90(source, 1, (2, 3))
    back = nearest_cells(source, turned)
    torch.testing.assert_close(
        cell_similarity(source, turned, back), torch.ones(2, G, G, dtype=torch.float64)
    )
    classifier = CorrespondenceClassifier(source[:1], torch.tensor([7]))
    found = classifier(source[0], cells=own[None])
    assert found.scores.tolist() == pytest.approx([1.0]) and found.neighbours.tolist() == [0]
    swapped = classifier(source[0], cells=own.flip(-1)[None])
    wanted = cosine(source[0, :, 1, 3], source[0, :, 3, 1])
    assert swapped.similarity[0, 1, 3].item() == pytest.approx(wanted)
    ones = torch.ones(1, 5, G, G)
    flat = CorrespondenceClassifier(ones, torch.tensor([7]))(ones[0])
    assert flat.automatic.all() and flat.scores.item() == pytest.approx(1.0)
    assert torch.equal(nearest_cells(ones, ones), torch.zeros_like(own)[None])


def test_cross_correlation_by_loops():
    source, target = drawn(2, 5, G, G) + 0.2, drawn(2, 5, G, G, seed=1) + 0.3
    found = cross_correlation_map(source, target)
    for k in range(2):
        a, b = (x[k].flatten(1) / (16 * x[k].mean((1, 2)).norm()) for x in (source, target))
        for z in range(16):
            wanted = sum(float(a[:, z] @ b[:, y]) for y in range(16))
            assert found[k, z // G, z % G].item() == pytest.approx(wanted)


def test_a_map_of_mean_zero_is_finite():
    zero = torch.cat([torch.ones(1, 5, G, G // 2), -torch.ones(1, 5, G, G // 2)], -1)
    assert torch.equal(cross_correlation_map(zero, zero), torch.zeros(1, G, G))
    assert cross_correlation_map(zero, torch.ones(1, 5, G, G)).isfinite().all()
    assert cell_similarity(zero * 0, zero, nearest_cells(zero * 0, zero)).eq(0).all()


def test_cells_of_points():
    points = torch.tensor([[[-1.0, -1], [1, 1], [0.0, 0.3], [-0.5, 0.99]]])
    assert cells_of_points(points).tolist() == [[[0, 0], [6, 6], [4, 3], [6, 1]]]


def test_an_empty_mask_is_none_and_ties_go_to_the_smallest_label():
    maps, labels = drawn(6, 5, G, G), torch.tensor([4, 2, 9, 2, 4, 9])
    classifier = CorrespondenceClassifier(maps, labels, votes=6)
    query = drawn(5, G, G, seed=9)
    none, empty = classifier(query), classifier(query, mask=torch.zeros(G, G, dtype=torch.bool))
    assert torch.equal(none.scores, empty.scores) and torch.equal(none.masks, empty.masks)
    assert (none.prediction, none.votes) == (2, 2)


def test_a_mask_decides_what_is_compared():
    """Half of each image is a digit's, half another's: the mask says which half is asked."""
    first, second = drawn(5, G, G, seed=1), drawn(5, G, G, seed=2)
    query = torch.cat([first[..., :2], second[..., 2:]], -1)
    classifier = CorrespondenceClassifier(torch.stack([first, second]), torch.tensor([1, 2]), votes=1)
    left = torch.zeros(G, G, dtype=torch.bool)
    left[:, :2] = True
    assert classifier(query, mask=left).prediction == 1
    assert classifier(query, mask=~left).prediction == 2


def test_digits():
    """The pixels of 4 x 4 overlapping patches are features enough to read most digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    patches = F.unfold(images.float().view(-1, 1, 8, 8), 5, padding=2, stride=2)
    maps = patches.unflatten(2, (G, G))
    classifier = CorrespondenceClassifier(maps[:1000], labels[:1000], votes=5)
    asked = zip(maps[1700:1740], labels[1700:1740], strict=True)
    right = sum(classifier(x).prediction == int(y) for x, y in asked)
    assert right > 0.8 * 40


@pytest.mark.door
def test_doors():
    maps, labels = torch.randn(3, 5, G, G), torch.arange(3)
    with pytest.raises(ValueError, match=r"maps have shape \(3, 5, 4, 3\), must be \(n, c, g, g\)"):
        CorrespondenceClassifier(maps[..., :3], labels)
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), must be \(3,\)"):
        CorrespondenceClassifier(maps, labels[:2])
    with pytest.raises(ValueError, match="top is 17, must be at most 16"):
        CorrespondenceClassifier(maps, labels, top=17)
    with pytest.raises(ValueError, match="votes is 0"):
        CorrespondenceClassifier(maps, labels, votes=0)
    classifier = CorrespondenceClassifier(maps, labels)
    with pytest.raises(ValueError, match=r"query has shape \(4, 4, 4\), must be \(5, 4, 4\) as the maps"):
        classifier(maps[0, :4])
    with pytest.raises(ValueError, match=r"mask is \(4, 4\) torch\.float32, must be \(4, 4\) torch\.bool"):
        classifier(maps[0], mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"cells have shape \(3, 15, 2\), must be \(3, 16, 2\)"):
        classifier(maps[0], cells=torch.zeros(3, 15, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"points must lie in \[-1, 1\]"):
        cells_of_points(torch.full((1, 1, 2), 1.5))
