from __future__ import annotations

import pytest
import torch
from tests.mixers.test_radial_attention import dense
from tests.test_chunk_gate import literal, pairs
from torch import Tensor

from heedful.mixers.grid.vmoba import VideoMixtureOfBlockAttention


def cubes(size: tuple, chunk: tuple) -> list[list[int]]:
    """The tokens of each chunk of a video, from where each token lies."""
    found: dict[tuple, list[int]] = {}
    number = 0
    for t in range(size[0]):
        for y in range(size[1]):
            for x in range(size[2]):
                found.setdefault((t // chunk[0], y // chunk[1], x // chunk[2]), []).append(number)
                number += 1
    return [found[place] for place in sorted(found)]


def slabs(n: int, length: int) -> list[list[int]]:
    return [list(range(a, min(a + length, n))) for a in range(0, n, length)]


def expected_of(m: VideoMixtureOfBlockAttention, x: Tensor, chunks: list[list[int]], rule: dict) -> Tensor:
    """Head by head with the literal selection; the mask differs by batch row and head."""
    rows = []
    for one in x:
        tokens = one.flatten(1).T
        q, k, _ = (tokens @ m.qkv.weight.T + m.qkv.bias).detach().unflatten(-1, (3, m.heads, -1)).unbind(1)
        seen = pairs(literal(q.transpose(0, 1), k.transpose(0, 1), chunks, **rule), chunks)
        assert not seen.all()
        rows.append(dense_per_head(m, one, seen))
    return torch.stack(rows)


def dense_per_head(m: VideoMixtureOfBlockAttention, x: Tensor, seen: Tensor) -> Tensor:
    tokens = x.flatten(1).T
    q, k, v = (
        (tokens @ m.qkv.weight.T + m.qkv.bias).unflatten(-1, (3, m.heads, -1)).permute(1, 2, 0, 3).unbind(0)
    )
    weight = (q @ k.mT * q.shape[-1] ** -0.5).exp() * seen
    heads = weight / weight.sum(-1, keepdim=True) @ v
    return (heads.transpose(0, 1).flatten(1) @ m.proj.weight.T + m.proj.bias).T.view_as(x)


SIZE = (4, 3, 5)
CASES = [
    (0, slabs(60, 22), {"select": "threshold", "scope": "head_global", "threshold": 0.3}),  # 1.5 frames
    (1, cubes(SIZE, (4, 2, 2)), {"select": "threshold", "scope": "query_head", "threshold": 0.25}),
    (2, cubes(SIZE, (2, 2, 3)), {"select": "threshold", "scope": "overall", "threshold": 0.4}),
    (3, slabs(60, 22), {"select": "topk", "scope": "query_head", "topk": 2}),
    (5, cubes(SIZE, (2, 2, 3)), {"select": "threshold", "scope": "block", "threshold": 0.3}),
]


@pytest.mark.parametrize(("layer", "chunks", "rule"), CASES)
def test_equals_transcription_with_gradients(layer: int, chunks: list, rule: dict) -> None:
    torch.manual_seed(layer)
    m = VideoMixtureOfBlockAttention(
        12, heads=2, layer=layer, chunks=(1.5, (2, 2), (2, 2, 3)), dtype=torch.float64, **rule
    )
    x = torch.randn(2, 12, *SIZE, dtype=torch.float64, requires_grad=True)
    y, expected = m(x), expected_of(m, x, chunks, rule)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *m.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_a_chunk_as_large_as_the_video_is_full_attention() -> None:
    x = torch.randn(1, 16, 2, 3, 4, dtype=torch.float64)
    for chunk in (2, (8, 8), (9, 9, 9)):
        m = VideoMixtureOfBlockAttention(16, heads=4, chunks=(chunk,), dtype=torch.float64)
        torch.testing.assert_close(m(x), dense(m, x, torch.ones(24, 24, dtype=torch.bool), 0.5))


def test_parameter_count() -> None:
    assert sum(p.numel() for p in VideoMixtureOfBlockAttention(24, heads=4).parameters()) == 4 * 24 * 25


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        VideoMixtureOfBlockAttention(16, heads=5)
    with pytest.raises(ValueError, match="chunks is empty"):
        VideoMixtureOfBlockAttention(16, chunks=())
    with pytest.raises(ValueError, match=r"chunks holds \(2, 0\)"):
        VideoMixtureOfBlockAttention(16, chunks=((2, 0),))
    with pytest.raises(ValueError, match="select is 'best'"):
        VideoMixtureOfBlockAttention(16, select="best")
    with pytest.raises(ValueError, match="scope is 'block'"):
        VideoMixtureOfBlockAttention(16, select="topk", scope="block")
    with pytest.raises(ValueError, match="threshold is -1"):
        VideoMixtureOfBlockAttention(16, threshold=-1.0)
    with pytest.raises(ValueError, match="topk is 0"):
        VideoMixtureOfBlockAttention(16, topk=0)
