from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import heedful
from heedful.routing.gilbert import block_neighbors, gilbert_order
from heedful.routing.rectified_blocks import rectified_attention, rectified_blocks


def literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    p_remain: float,
    neighbors: Tensor | None = None,
    first_blocks: int = 0,
    text: int = 0,
) -> tuple[Tensor, list[set[int]], Tensor]:
    """One batch row and head: (n, d) each. Output, blocks seen by each block, and the shares."""
    n, d = q.shape[0] - text, q.shape[1]
    count = -(-n // block_size)

    def block(x: Tensor, i: int) -> list[Tensor]:
        rows = [x[t] for t in range(i * block_size, min((i + 1) * block_size, n))]
        return rows + [torch.zeros_like(x[0])] * (block_size - len(rows))

    qm, km, vm = ([sum(block(x, i)) / block_size for i in range(count)] for x in (q, k, v))
    qd, kd = (
        [sum((t - m[i]).abs() for t in block(x, i)) / block_size for i in range(count)]
        for x, m in ((q, qm), (k, km))
    )
    out = torch.zeros_like(v)
    seen, shares = [], []
    for i in range(count):
        z = [qm[i] @ km[j] for j in range(count)]
        weights = [(x / d**0.5).exp() for x in z]
        slots = [w / sum(weights) for w in weights]
        if text:
            extra = [(qm[i] @ k[t] / d**0.5).exp() for t in range(n, n + text)]
            all_weights = sum(weights) + sum(extra)
            visual, words = [w / all_weights for w in weights], sum(extra) / all_weights
            whole = sum(visual) * block_size + words
            slots = [p * block_size / whole for p in visual] + [words / whole]
        order = sorted(range(len(slots)), key=lambda s: -slots[s].item())
        enough, covered = 1, 0.0
        for s in order:
            covered += slots[s].item()
            enough += covered <= p_remain
        selected = {s for s in order[: max(enough, top_k)] if s < count}
        if neighbors is not None:
            selected |= {j for j in range(count) if neighbors[i, j]}
        if i < first_blocks:
            selected |= set(range(first_blocks))
        untrusted = set()
        for j in range(count):
            gain = abs(z[j]) * block_size**2
            error = (abs(qd[i] @ km[j]) + abs(qm[i] @ kd[j])) * block_size**2
            if not gain > error:
                untrusted.add(j)
        crit = selected | untrusted
        share = sum(p for s, p in enumerate(slots) if s in crit or s == count)
        rest = sum((slots[j] * vm[j] for j in range(count) if j not in crit), torch.zeros_like(vm[0]))
        keys = [t for t in range(n) if t // block_size in selected] + list(range(n, n + text))
        for t in range(i * block_size, min((i + 1) * block_size, n)):
            weight = torch.stack([(q[t] @ k[s] / d**0.5).exp() for s in keys])
            out[t] = share * (weight / weight.sum()) @ v[keys] + rest
        seen.append(selected)
        shares.append(share)
    for t in range(n, n + text):
        out[t] = (q[t] @ k.T / d**0.5).softmax(-1) @ v
    return out, seen, torch.stack(shares)


def smooth(n: int, seed: int, offset: float = 0.0) -> Tensor:
    """Tokens that change slowly, so that some block means can be trusted and some cannot."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64)
    return 0.4 * x + 0.5 * x.cumsum(2) + offset


CASES = [
    (24, {"block_size": 4, "top_k": 2, "p_remain": 0.3}),
    (26, {"block_size": 4, "top_k": 1, "p_remain": 0.1, "first_blocks": 2}),
    (21, {"block_size": 3, "top_k": 1, "p_remain": 0.7, "neighbors": torch.eye(7, dtype=torch.bool)}),
    (25, {"block_size": 4, "top_k": 2, "p_remain": 0.2, "text": 5}),
    (
        27,
        {
            "block_size": 3,
            "top_k": 1,
            "p_remain": 0.4,
            "text": 3,
            "neighbors": torch.eye(8, dtype=torch.bool),
        },
    ),
]


@pytest.mark.parametrize(("n", "how"), CASES)
def test_equals_transcription_with_gradients(n: int, how: dict) -> None:
    q, k, v = (smooth(n, seed, 0.2).requires_grad_() for seed in range(3))
    text = how.get("text", 0)
    y = rectified_attention(q, k, v, **how)
    rows = [[literal(q[b, h], k[b, h], v[b, h], **how) for h in range(2)] for b in range(2)]
    expected = torch.stack([torch.stack([cell[0] for cell in row]) for row in rows])
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (q, k, v), up), torch.autograd.grad(expected, (q, k, v), up)
    )
    arguments = {name: value for name, value in how.items() if name != "text"}
    visual = n - text
    found = rectified_blocks(
        q[:, :, :visual],
        k[:, :, :visual],
        text_key=k[:, :, visual:] if text else None,
        **arguments,
    )
    tiles = found.table.dense()[:, :, :: how["block_size"], :: how["block_size"]]
    for b, h in itertools.product(range(2), range(2)):
        assert [set(row.nonzero().flatten().tolist()) for row in tiles[b, h]] == rows[b][h][1]
        torch.testing.assert_close(found.share[b, h], rows[b][h][2])
    torch.testing.assert_close(found.share + found.pooled.sum(-1), torch.ones_like(found.share))
    assert (found.share > 0).all()


def test_the_cases_have_blocks_of_every_sort() -> None:
    q, k = smooth(24, 0, 0.2), smooth(24, 1, 0.2)
    found = rectified_blocks(q, k, **CASES[0][1])
    selected = found.table.dense()[:, :, ::4, ::4]
    pooled = found.pooled > 0
    assert selected.any()
    assert pooled.any()
    assert not (selected & pooled).any()
    assert (~selected & ~pooled).any()  # dropped and not trusted


def test_all_blocks_seen_is_full_attention() -> None:
    q, k, v = (smooth(24, seed) for seed in range(3))
    y = rectified_attention(q, k, v, block_size=4, top_k=6)
    torch.testing.assert_close(y, heedful.attention(q, k, v))
    assert not torch.allclose(rectified_attention(q, k, v, block_size=4, top_k=1), y)


def test_blocks_of_equal_tokens_are_full_attention_for_any_selection() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64).repeat_interleave(4, 2) for _ in range(3))
    for top_k in (1, 3):
        y = rectified_attention(q, k, v, block_size=4, top_k=top_k, p_remain=0.0)
        torch.testing.assert_close(y, heedful.attention(q, k, v))


def test_the_choice_passes_no_gradient_but_the_shares_do() -> None:
    q, k = smooth(24, 0).requires_grad_(), smooth(24, 1).requires_grad_()
    found = rectified_blocks(q, k, block_size=4, top_k=2)
    assert found.share.requires_grad
    assert found.pooled.requires_grad
    assert found.table.mask_fn is None
    (grad,) = torch.autograd.grad(found.share.sum(), q)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 5, 7), (4, 6, 7), (5, 4, 2), (2, 9, 3), (3, 3, 8), (8, 8, 8)]
)
def test_the_curve_visits_every_token_once_by_small_steps(size: tuple[int, int, int]) -> None:
    order = gilbert_order(size)
    assert order.sort().values.tolist() == list(range(size[0] * size[1] * size[2]))
    places = torch.stack(torch.unravel_index(order, size), -1)
    steps = (places[1:] - places[:-1]).abs()
    assert steps.numel() == 0 or int(steps.max()) == 1
    assert int((steps.sum(-1) > 1).sum()) <= 2 * len(order) // 10
    if all(length % 2 == 0 for length in size):
        assert (steps.sum(-1) == 1).all()
    assert order[0] == 0


@pytest.mark.parametrize(("size", "block"), [((2, 3, 4), 5), ((3, 4, 2), 4), ((1, 1, 7), 3)])
def test_neighbors_are_blocks_that_touch(size: tuple[int, int, int], block: int) -> None:
    order = gilbert_order(size).tolist()
    place = [torch.unravel_index(torch.tensor(t), size) for t in order]
    count = -(-len(order) // block)
    touch = torch.zeros(count, count, dtype=torch.bool)
    for a, b in itertools.product(range(len(order)), repeat=2):
        if all(abs(int(x) - int(y)) <= 1 for x, y in zip(place[a], place[b], strict=True)):
            touch[a // block, b // block] = True
    assert torch.equal(block_neighbors(size, block), touch)


@pytest.mark.door
def test_errors() -> None:
    q = torch.zeros(1, 1, 8, 2)
    with pytest.raises(ValueError, match="block_size is 0"):
        rectified_blocks(q, q, block_size=0, top_k=1)
    with pytest.raises(ValueError, match="top_k is 0"):
        rectified_blocks(q, q, block_size=2, top_k=0)
    with pytest.raises(ValueError, match=r"neighbors has shape \(3, 3\), must be \(4, 4\)"):
        rectified_blocks(q, q, block_size=2, top_k=1, neighbors=torch.eye(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"size is \(2, 3\), must be"):
        gilbert_order((2, 3))
    with pytest.raises(ValueError, match=r"size\[1\] is 0"):
        block_neighbors((2, 0, 3), 4)
    with pytest.raises(ValueError, match="block_size is 0"):
        block_neighbors((2, 1, 3), 0)
