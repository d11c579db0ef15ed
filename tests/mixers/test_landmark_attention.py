"""Landmark attention: grouped softmax by loops, the blockwise form, decoding, and retrieval from a memory."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.sparse.landmark_attention import LandmarkAttention
from heedful.mixers.sparse.landmark_memory import LandmarkMemory
from heedful.ops import landmark
from heedful.ops.landmark import landmark_attention, landmark_softmax

F64 = torch.float64


def weights_by_hand(scores, is_landmark, seen=None):
    """The card's groups for scores (n, m) of one head, query by query; seen: tokens that are not padding."""
    n, m = scores.shape
    seen = [True] * m if seen is None else list(seen)
    rows = []
    for i in range(n):
        at = i + m - n
        marks = [j for j in range(at) if is_landmark[j]]
        start = marks[-1] + 1 if marks else 0
        own = [j for j in range(start, at + 1) if not is_landmark[j] and seen[j]]
        blocks = {}
        for mark, before in zip(marks, [-1, *marks], strict=False):
            tokens = [j for j in range(before + 1, mark) if seen[j]]
            if tokens or all(seen):
                blocks[mark] = tokens
        row = [scores.new_zeros(())] * m
        group = own + list(blocks)
        if group:
            p = dict(zip(group, torch.stack([scores[i, j] for j in group]).softmax(0), strict=True))
            for j in own:
                row[j] = p[j]
            for mark, tokens in blocks.items():
                if tokens:
                    inside = torch.stack([scores[i, j] for j in tokens]).softmax(0)
                    for j, q in zip(tokens, inside, strict=True):
                        row[j] = p[mark] * q
        rows.append(torch.stack(row))
    return torch.stack(rows)


def regular(m, block_size):
    return torch.arange(m) % (block_size + 1) == block_size


def causal_softmax(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("n", [13, 4])
def test_grouped_softmax_equals_loops_with_landmarks_anywhere(n):
    torch.manual_seed(1)
    scores = (3 * torch.randn(2, 2, n, 13, dtype=F64)).requires_grad_()
    is_landmark = torch.rand(2, 13) < 0.3
    is_landmark[0, 0] = is_landmark[1, 4] = is_landmark[1, 5] = True  # blocks without tokens
    ours = landmark_softmax(scores, is_landmark)
    expected = torch.stack(
        [torch.stack([weights_by_hand(scores[b, h], is_landmark[b]) for h in range(2)]) for b in range(2)]
    )
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grad, want = (torch.autograd.grad((w * weight).sum(), scores)[0] for w in (ours, expected))
    torch.testing.assert_close(grad, want)
    assert ours[is_landmark[:, None, None].expand_as(ours)].abs().max() == 0


def test_final_weights_sum_to_one():
    scores = torch.randn(2, 3, 17, 17, dtype=F64)
    weights = landmark_softmax(scores, regular(17, 4).expand(2, 17))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 17, dtype=F64))
    assert weights[..., regular(17, 4)].abs().max() == 0


def test_without_landmarks_and_within_one_block_it_is_causal_softmax():
    scores = torch.randn(1, 2, 9, 9, dtype=F64)
    none = torch.zeros(1, 9, dtype=torch.bool)
    torch.testing.assert_close(landmark_softmax(scores, none), causal_softmax(scores))
    last = none.clone()
    last[:, -1] = True
    ours = landmark_softmax(scores, last)
    torch.testing.assert_close(ours[..., :-1, :], causal_softmax(scores)[..., :-1, :])
    # The landmark itself sees its block and not itself.
    torch.testing.assert_close(ours[..., -1, :-1], scores[..., -1, :-1].softmax(-1))


def test_right_after_a_landmark_the_block_before_is_reached_through_it_alone():
    scores = torch.randn(1, 1, 4, 4, dtype=F64)
    row = landmark_softmax(scores, regular(4, 2)[None])[0, 0, 3]
    own, mark = scores[0, 0, 3, 3], scores[0, 0, 3, 2]
    torch.testing.assert_close(row[3], torch.sigmoid(own - mark))
    torch.testing.assert_close(row[0] + row[1], torch.sigmoid(mark - own))


def test_backward_of_the_groups():
    """For weights p of one group and gradient g the logits get g p - p sum(g p)."""
    scores = torch.randn(1, 1, 6, 6, dtype=F64, requires_grad=True)
    weights = landmark_softmax(scores, regular(6, 2)[None])
    g = torch.randn(6, dtype=F64)
    grad = torch.autograd.grad(weights[0, 0, 5], scores, g)[0][0, 0, 5]
    s = scores[0, 0, 5].detach()
    # Row 5 is the landmark of the block {3, 4}: G* = {3, 4, landmark 2}, group of the past block = {0, 1}.
    p = torch.stack([s[3], s[4], s[2]]).softmax(0)
    inside = s[:2].softmax(0)
    upper = torch.stack([g[3], g[4], (g[:2] * inside).sum()])
    lower = g[:2] * p[2]
    expected = torch.zeros(6, dtype=F64)
    expected[[3, 4, 2]] = upper * p - p * (upper * p).sum()
    expected[:2] = lower * inside - inside * (lower * inside).sum()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("chunk", [1 << 23, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [41, 9, 1])
def test_blockwise_form_equals_the_dense_one(monkeypatch, chunk, masked, n):
    monkeypatch.setattr(landmark, "_CHUNK", chunk)  # 1: parts of 16 rows, recomputed in the backward pass
    m, block_size = 41, 4
    q, k, v = (torch.randn(2, 2, t, 3, dtype=F64, requires_grad=True) for t in (n, m, m))
    mask = None
    if masked:
        mask = torch.rand(2, m) < 0.7
        mask[0, 5:9] = mask[1, :2] = False  # a whole block; the first queries see nothing
        mask[0, 9] = True
    ours = landmark_attention(q, k, v, block_size=block_size, key_mask=mask)
    scores = q @ k.mT / math.sqrt(3)
    is_landmark = regular(m, block_size)
    if mask is None:
        expected = landmark_softmax(scores, is_landmark.expand(2, m)) @ v
    else:
        each_row = zip(scores, mask, strict=True)
        rows = [torch.stack([weights_by_hand(s, is_landmark, seen) for s in part]) for part, seen in each_row]
        expected = torch.stack(rows) @ v
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("retrieve", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [41, 9])
def test_fetched_blocks_are_the_only_ones_there(monkeypatch, retrieve, masked, n):
    """Each row is that of `weights_by_hand` once the blocks it does not fetch are taken out."""
    monkeypatch.setattr(landmark, "_CHUNK", 1)
    m, block_size = 41, 4
    q, k, v = (torch.randn(1, 2, t, 3, dtype=F64, requires_grad=True) for t in (n, m, m))
    mask = torch.ones(1, m, dtype=torch.bool)
    if masked:
        mask[:] = torch.rand(1, m) < 0.7
        mask[0, 5:9], mask[0, 9] = False, True  # a whole block but for its landmark
    given = mask if masked else None
    ours = landmark_attention(q, k, v, block_size=block_size, retrieve=retrieve, key_mask=given)
    is_landmark = regular(m, block_size)
    rows = []
    for head in range(2):
        for i in range(n):
            score = q[0, head, i] @ k[0, head].mT / math.sqrt(3)
            at = i + m - n
            marks = [j for j in range(at) if is_landmark[j] and mask[0, j - block_size : j].any()]
            best = sorted(marks, key=lambda j: -score[j].item())[:retrieve]
            keep = [j for j in range(at + 1) if any(b - block_size <= j <= b for b in best)]
            keep += [j for j in range(at // (block_size + 1) * (block_size + 1), at + 1)]
            seen = mask[0, keep] | is_landmark[keep]
            weights = weights_by_hand(score[None, keep], is_landmark[keep], seen if masked else None)
            rows.append(weights[0] @ v[0, head, keep])
    expected = torch.stack(rows).view(1, 2, n, 3)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, want)


def test_no_score_matrix_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(landmark, "_CHUNK", 1)
    kept = []

    def watch(x):
        kept.append(x.numel())
        return x

    q = torch.randn(1, 1, 400, 4, requires_grad=True)
    k, v = (torch.randn(1, 1, 80, 5, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda x: x):
        out, _ = landmark._past_blocks(q, k, v, None, 0, 0.0)
    out.sum().backward()
    assert len(kept) > 25  # parts of 16 rows
    assert max(kept) <= 400 * 4


def build(**options):
    torch.manual_seed(2)
    mixer = LandmarkAttention(**{"dim": 16, "heads": 2, "block_size": 4, "dtype": F64, **options})
    for q in mixer.parameters():
        torch.nn.init.normal_(q, std=0.4)
    return mixer


def turned(x, positions):
    """Rotary embedding of x (b, h, t, d): neighbouring channels as complex numbers."""
    d = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=F64) / d)
    turn = torch.polar(torch.ones(()).double(), positions.double()[..., None] * frequency)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def full_pass(mixer, x, is_landmark, positions=None):
    """The dense layer on a sequence that holds its landmarks."""
    b, t, c = x.shape
    positions = torch.arange(t) if positions is None else positions
    layers = (mixer.query, mixer.key, mixer.value)
    q, k, v = ((x @ w.weight.T).view(b, t, mixer.heads, -1).transpose(1, 2) for w in layers)
    scores = turned(q, positions) @ turned(k, positions).mT / math.sqrt(q.shape[-1])
    rows = [torch.stack([weights_by_hand(s, is_landmark) for s in each]) for each in scores]
    return (torch.stack(rows) @ v).transpose(1, 2).reshape(b, t, c) @ mixer.out.weight.T


@pytest.mark.parametrize("length", [1, 3, 4, 5, 14])
def test_mixer_inserts_and_removes_landmarks(length):
    mixer = build()
    x = torch.randn(2, length, 16, dtype=F64, requires_grad=True)
    rows, keep = [], []
    for t in range(length):
        keep.append(len(rows))
        rows.append(x[:, t])
        if (t + 1) % 4 == 0:
            rows.append(mixer.landmark.expand(2, 16))
    is_landmark = torch.ones(len(rows), dtype=torch.bool)
    is_landmark[keep] = False
    expected = full_pass(mixer, torch.stack(rows, 1), is_landmark)[:, keep]
    ours = mixer(x)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    if length > 4:
        assert torch.autograd.grad(mixer(x).pow(2).sum(), mixer.landmark)[0].abs().max() > 0


def test_mixer_on_a_sequence_that_holds_its_landmarks():
    mixer = build(insert=False)
    x = torch.randn(2, 14, 16, dtype=F64)
    torch.testing.assert_close(mixer(x), full_pass(mixer, x, regular(14, 4)))


@pytest.mark.parametrize("options", [{}, {"insert": False}, {"retrieve": 2}])
@pytest.mark.parametrize("cuts", [(1,) * 14, (4, 1, 9), (5, 0, 3, 6), (14,)])
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_equal_the_whole(options, cuts, masked):
    mixer = build(**options)
    x = torch.randn(2, 14, 16, dtype=F64)
    mask = torch.rand(2, 14) < 0.6
    state, pieces, place = mixer.init_state(2), [], 0
    for part in x.split(cuts, 1):
        # A mask that comes late: everything before may be seen.
        seen = mask[:, place : place + part.shape[1]] if masked and place >= 5 else None
        y, state = mixer(part, mask=seen, state=state)
        pieces.append(y)
        place += part.shape[1]
        assert state.length == place
    late, place = torch.ones_like(mask), 0
    for cut in cuts:
        if masked and place >= 5:
            late[:, place : place + cut] = mask[:, place : place + cut]
        place += cut
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x, mask=late))


def test_positions_count_tokens():
    mixer = build()
    x = torch.randn(2, 14, 16, dtype=F64)
    torch.testing.assert_close(mixer(x, positions=torch.arange(14).expand(2, 14)), mixer(x))
    torch.testing.assert_close(mixer(x, positions=torch.arange(14) + 40), mixer(x))  # whole blocks later


def test_parameter_counts():
    # The paper's layer: 1024 channels, 8 heads, no biases; and one landmark.
    assert (
        sum(q.numel() for q in LandmarkAttention(1024, insert=False, device="meta").parameters())
        == 4 * 1024**2
    )
    assert sum(q.numel() for q in LandmarkAttention(1024, device="meta").parameters()) == 4 * 1024**2 + 1024


# -- memory ------------------------------------------------------------------------------------------


def memory_by_hand(mixer, pieces, blocks, topk, selection):
    """Steps a to e of the card, query by query, on pieces that hold their landmarks."""
    length = mixer.block_size + 1
    h, d = mixer.heads, mixer.head_dim
    results, held, rest, total = [], [], [], 0  # held: (keys, values) of whole blocks (b, h, length, d)
    for x in pieces:
        b, t, c = x.shape
        layers = (mixer.query, mixer.key, mixer.value)
        q, k, v = ((x @ w.weight.T).view(b, t, h, d).transpose(1, 2) for w in layers)
        n, take = len(held), min(topk, len(held))
        slot = [0 if i < n - take else i - (n - take) + 1 for i in range(n)]
        start = min(total // length, topk + 1) * length + len(rest)
        q = turned(q, torch.arange(start, start + t))
        near_k = torch.cat([r[0] for r in rest] + [k], 2)
        near_v = torch.cat([r[1] for r in rest] + [v], 2)
        near_at = torch.arange(start - len(rest), start + t)
        is_near_mark = [(j % length) == length - 1 for j in range(len(rest) + t)]
        if take:
            at = [torch.tensor([s * length + length - 1]) for s in slot]
            rank = [(q * turned(held[i][0][:, :, -1:], at[i])).sum(-1) for i in range(n)]
            rank = (torch.stack(rank, -1) / math.sqrt(d)).softmax(-1)
            if selection == "max_over_heads":
                rank = rank.amax(1, keepdim=True).expand(b, h, t, n)
            if selection == "max_over_tokens":
                rank = rank.amax(2, keepdim=True).expand(b, h, t, n)
        heads = torch.zeros(b, h, t, d, dtype=F64)
        for bi in range(b):
            for hi in range(h):
                for i in range(t):
                    keys, values, marks = [], [], []
                    chosen = sorted(rank[bi, hi, i].argsort(descending=True)[:take].tolist()) if take else []
                    for r, block in enumerate(chosen):
                        first = r * length + (length if slot[block] > 0 else 0)
                        keys.append(turned(held[block][0][bi, hi], torch.arange(first, first + length)))
                        values.append(held[block][1][bi, hi])
                        marks += [False] * (length - 1) + [True]
                    stop = len(rest) + i + 1
                    keys.append(turned(near_k[bi, hi], near_at)[:stop])
                    values.append(near_v[bi, hi, :stop])
                    scores = q[bi, hi, i] @ torch.cat(keys).T / math.sqrt(d)
                    weights = weights_by_hand(scores[None], marks + is_near_mark[:stop])[0]
                    heads[bi, hi, i] = weights @ torch.cat(values)
        results.append(heads.transpose(1, 2).reshape(b, t, c) @ mixer.out.weight.T)
        rest += [(k[:, :, j : j + 1], v[:, :, j : j + 1]) for j in range(t)]
        while len(rest) >= length:
            block, rest = rest[:length], rest[length:]
            held.append(tuple(torch.cat([r[s] for r in block], 2) for s in (0, 1)))
        held = held[-blocks:]
        total += t
    return results


@pytest.mark.parametrize("selection", ["per_token_and_head", "max_over_heads", "max_over_tokens"])
@pytest.mark.parametrize("topk", [0, 1, 2, 3])
def test_memory_equals_the_card(selection, topk):
    mixer = build(insert=False)
    x = torch.randn(2, 40, 16, dtype=F64)
    pieces = x.split((13, 7, 8, 12), 1)  # 2 blocks and 3 places, then to the end of block 4, 5 and 3, 8
    memory = LandmarkMemory(mixer, blocks=4, topk=topk, selection=selection)
    state = memory.init_state(2)
    for part, expected in zip(pieces, memory_by_hand(mixer, pieces, 4, topk, selection), strict=True):
        y, state = memory(part, state)
        torch.testing.assert_close(y, expected)
    assert state.length == 40
    assert state.key.shape == (2, 2, 4 * 5, 8)


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("cuts", [(23,), (9, 1, 1, 12), (5, 5, 5, 5, 3)])
def test_all_blocks_at_their_own_positions_give_the_full_pass(insert, cuts):
    mixer = build(insert=insert)
    x = torch.randn(2, 23, 16, dtype=F64)
    memory = LandmarkMemory(mixer, blocks=9, topk=9, positions="true")
    state, pieces = memory.init_state(2), []
    for part in x.split(cuts, 1):
        y, state = memory(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))


def test_inserted_and_given_landmarks_agree_in_the_memory(monkeypatch):
    monkeypatch.setattr("heedful.mixers.sparse.landmark_memory._CHUNK", 1)  # one query at a time
    inserting, given = build(), build(insert=False)
    given.load_state_dict({name: w for name, w in inserting.state_dict().items() if name != "landmark"})
    x = torch.randn(2, 26, 16, dtype=F64)
    one, two = (LandmarkMemory(m, blocks=3, topk=2) for m in (inserting, given))
    state, other = one.init_state(2), two.init_state(2)
    for part in x.split((11, 6, 9), 1):
        whole, _, is_landmark = inserting.with_landmarks(part, state.length)
        y, state = one(part, state)
        z, other = two(whole, other)
        torch.testing.assert_close(y, z[:, ~is_landmark])


def test_memory_states_reorder():
    memory = LandmarkMemory(build(), blocks=3, topk=1)
    x = torch.randn(2, 20, 16, dtype=F64)
    _, state = memory(x[:, :13], memory.init_state(2))
    swapped, _ = memory(x[:, 13:].flip(0), state.reorder(torch.tensor([1, 0])))
    straight, _ = memory(x[:, 13:], state)
    torch.testing.assert_close(swapped, straight.flip(0))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="block_size is 0"):
        LandmarkAttention(16, block_size=0)
    with pytest.raises(ValueError, match="retrieve is 0"):
        LandmarkAttention(16, retrieve=0)
    with pytest.raises(ValueError, match="dim / heads is 3"):
        LandmarkAttention(12, heads=4)
    with pytest.raises(ValueError, match="topk is -1"):
        LandmarkMemory(build(), blocks=2, topk=-1)
    with pytest.raises(ValueError, match="selection is 'best'"):
        LandmarkMemory(build(), blocks=2, selection="best")
    with pytest.raises(ValueError, match="positions is 'far'"):
        LandmarkMemory(build(), blocks=2, positions="far")
    with pytest.raises(ValueError, match="is_landmark has shape"):
        landmark_softmax(torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, dtype=torch.bool))
