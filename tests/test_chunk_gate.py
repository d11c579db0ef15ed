from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import heedful
from heedful.routing.block_topk import grid_blocks
from heedful.routing.chunk_gate import chunk_groups, moba_chunks

SCOPES = ("query_head", "head_global", "block", "overall")


def literal(
    q: Tensor,
    k: Tensor,
    chunks: list[list[int]],
    *,
    select: str,
    scope: str,
    threshold: float = 0.25,
    topk: int = 3,
    samples: list[int] | None = None,
) -> Tensor:
    """The steps of selection for one batch row, entry by entry; (h, c, n)."""
    heads, n, _ = q.shape
    where = {s: c for c, chunk in enumerate(chunks) for s in chunk}
    samples = samples or [0] * n
    gates, scopes = {}, {}
    for h, c, s in itertools.product(range(heads), range(len(chunks)), range(n)):
        if samples[chunks[c][0]] == samples[s]:
            gates[h, c, s] = float(sum(k[h, t] for t in chunks[c]) @ q[h, s]) / len(chunks[c])
        name = {"query_head": (h, s), "head_global": h, "block": c, "overall": None}[scope]
        scopes.setdefault(name, []).append((h, c, s))
    chosen = set()
    for entries in scopes.values():
        valid = [e for e in entries if e in gates]
        if select == "topk":
            most = min(topk, len(chunks)) * len(entries) // len(chunks)
            best = sorted(valid, key=lambda e: (where[e[2]] != e[1], -gates[e]))
            chosen |= set(best[:most])
            continue
        low, high = min(gates[e] for e in valid), max(gates[e] for e in valid)
        span = high - low if high - low > 1e-6 else 1.0
        g = {e: (gates[e] - low) / span for e in valid}
        total = sum(g.values()) + 1e-6
        missing = max(0.0, threshold - sum(g[e] for e in valid if where[e[2]] == e[1]) / total)
        others = sorted((e for e in valid if where[e[2]] != e[1]), key=lambda e: -g[e])
        covered = 0.0
        for e in others:
            chosen.add(e)
            covered += g[e]
            if covered / total >= missing:
                break
    seen = torch.zeros(heads, len(chunks), n, dtype=torch.bool)
    for h, c, s in itertools.product(range(heads), range(len(chunks)), range(n)):
        seen[h, c, s] = where[s] == c or (h, c, s) in chosen
    return seen


def pairs(seen: Tensor, chunks: list[list[int]]) -> Tensor:
    """From chunks seen (h, c, n) to keys seen (h, n, m)."""
    mask = torch.zeros(seen.shape[0], seen.shape[2], seen.shape[2], dtype=torch.bool)
    for c, chunk in enumerate(chunks):
        mask[:, :, chunk] = seen[:, c, :, None].expand(-1, -1, len(chunk))
    return mask


def live(blocks: Tensor) -> list[list[int]]:
    return [[t for t in row if t >= 0] for row in blocks.tolist()]


RULES = [
    *({"select": "threshold", "scope": s, "threshold": t} for s in SCOPES for t in (0.2, 0.6)),
    *({"select": "topk", "scope": s, "topk": t} for s in SCOPES if s != "block" for t in (1, 2, 3)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize(("size", "block"), [((17,), (4,)), ((2, 4, 3), (2, 2, 3)), ((3, 3, 3), (2, 2, 2))])
def test_selection_is_the_definition(rule: dict, size: tuple, block: tuple) -> None:
    torch.manual_seed(len(size) + block[0])
    n = torch.Size(size).numel()
    q, k = torch.randn(2, 2, 2, n, 4, dtype=torch.float64)
    chunks = grid_blocks(size, block)
    found = moba_chunks(q, k, chunks, **rule).dense(2, 2)
    for b in range(2):
        expected = literal(q[b], k[b], live(chunks), **rule)
        assert torch.equal(found[b], pairs(expected, live(chunks)))


@pytest.mark.parametrize("rule", RULES[::3], ids=lambda r: "-".join(map(str, r.values())))
def test_packed_samples_share_a_scope_and_no_keys(rule: dict) -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 2, 19, 4, dtype=torch.float64)
    chunks = torch.tensor(
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, -1, -1], [10, 11, 12], [13, 14, 15], [16, 17, 18]]
    )
    samples = [0] * 10 + [1] * 9
    found = moba_chunks(q, k, chunks, samples=torch.tensor(samples), **rule).dense(1, 2)[0]
    assert torch.equal(found, pairs(literal(q[0], k[0], live(chunks), samples=samples, **rule), live(chunks)))
    assert not found[:, :10, 10:].any()
    assert not found[:, 10:, :10].any()


def test_attention_over_the_selection_passes_no_gradient_to_the_choice() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 4, 21, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    chunks = grid_blocks((21,), (5,))
    groups = moba_chunks(q, k, chunks, threshold=0.4)
    seen = torch.stack(
        [
            pairs(
                literal(a, b, live(chunks), select="threshold", scope="head_global", threshold=0.4),
                live(chunks),
            )
            for a, b in zip(q.detach(), k.detach(), strict=True)
        ]
    )
    assert 0 < seen.float().mean() < 1
    expected = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    up = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), up)
    for backend in ("reference", "tiled"):
        y = heedful.attention(q, k, v, pattern=groups, backend=backend)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, (q, k, v), up), wanted)


@pytest.mark.parametrize("scope", SCOPES)
def test_all_of_the_similarity_is_full_attention(scope: str) -> None:
    q, k = torch.randn(2, 1, 2, 18, 4, dtype=torch.float64)
    assert moba_chunks(q, k, grid_blocks((18,), (4,)), scope=scope, threshold=1.0).dense(1, 2).all()


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
def test_topk_of_all_chunks_is_full_attention(scope: str) -> None:
    q, k = torch.randn(2, 1, 2, 18, 4)
    chunks = grid_blocks((18,), (4,))
    assert moba_chunks(q, k, chunks, select="topk", scope=scope, topk=9).dense(1, 2).all()


def test_one_chunk_is_full_attention() -> None:
    q = torch.randn(1, 2, 7, 4)
    assert moba_chunks(q, q, grid_blocks((7,), (7,))).dense(1, 2).all()


def test_nothing_picked_is_the_own_chunk_or_all_in_the_authors_code() -> None:
    q, k = torch.randn(2, 1, 1, 12, 4)
    chunks = grid_blocks((12,), (3,))
    own = moba_chunks(q, k, chunks, select="topk", scope="query_head", topk=1)
    block = torch.arange(12) // 3
    assert torch.equal(own.dense()[0, 0], block[:, None] == block)
    assert moba_chunks(q, k, chunks, select="topk", scope="query_head", topk=1, legacy=True).dense().all()


def test_at_least_one_other_chunk_even_when_the_own_suffices() -> None:
    k = torch.zeros(1, 1, 6, 2)
    k[..., :2, 0], k[..., 2:4, 0], k[..., 4:, 0] = 10.0, 1.0, 0.5
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 6, 2)
    seen = moba_chunks(q, k, grid_blocks((6,), (2,)), scope="query_head", threshold=0.1).dense()[0, 0]
    # The first two tokens' own chunk holds nearly all of the similarity; the next best comes along.
    assert seen[0].tolist() == [True, True, True, True, False, False]
    assert seen[5].tolist() == [True, True, False, False, True, True]


def test_groups_are_small_however_popular_a_chunk_is() -> None:
    seen = torch.zeros(1, 2, 4, 40, dtype=torch.bool)
    seen[0, 0, 1] = True  # all like one chunk
    seen[0, 1, :, :3] = True
    chunks = grid_blocks((40,), (10,))
    groups = chunk_groups(seen, chunks, tile=16)
    assert groups.query_index.shape == (1, 2, 4, 16)
    assert torch.equal(groups.dense()[0], pairs(seen[0], live(chunks)))
    assert int((groups.query_index >= 0).sum()) == 40 + 12


@pytest.mark.door
def test_errors() -> None:
    q = torch.zeros(1, 1, 6, 2)
    chunks = grid_blocks((6,), (2,))
    with pytest.raises(ValueError, match="select is 'best'"):
        moba_chunks(q, q, chunks, select="best")
    with pytest.raises(ValueError, match="scope is 'head'"):
        moba_chunks(q, q, chunks, scope="head")
    with pytest.raises(ValueError, match="scope is 'block'"):
        moba_chunks(q, q, chunks, select="topk", scope="block")
    with pytest.raises(ValueError, match="threshold is 0"):
        moba_chunks(q, q, chunks, threshold=0.0)
    with pytest.raises(ValueError, match="topk is 0"):
        moba_chunks(q, q, chunks, topk=0)
