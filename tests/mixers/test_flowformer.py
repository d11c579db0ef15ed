from __future__ import annotations

import re
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from heedful import authors, create
from heedful.mixers.linear.flowformer import FlowAttention
from heedful.ops import flow
from heedful.ops.flow import FlowState, flow_attention


def draw(n: int, m: int | None = None, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    m = n if m is None else m
    shapes = ((2, 3, n, 4), (2, 3, m, 4), (2, 3, m, 5))
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.requires_grad_() for x in drawn]


def masks(n: int, m: int) -> tuple[Tensor, Tensor]:
    query_mask, key_mask = torch.ones(2, n, dtype=torch.bool), torch.ones(2, m, dtype=torch.bool)
    query_mask[0, -2:] = False
    key_mask[0, :2] = False
    key_mask[1, 3] = False
    return query_mask, key_mask


def full(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """One head, pair by pair."""
    q, k = 1 / (1 + torch.exp(-q)), 1 / (1 + torch.exp(-k))
    n, m = len(q), len(k)
    incoming = torch.stack([1 / ((q[i] + eps) @ (sum(k) + eps)) for i in range(n)])
    outgoing = torch.stack([1 / ((k[j] + eps) @ (sum(q) + eps)) for j in range(m)])
    rows = []
    into = sum(q[i] * incoming[i] for i in range(n))
    won = torch.stack([((k[j] + eps) @ (into + eps)).clamp(-1, 1).exp() for j in range(m)])
    for i in range(n):
        conserved = (q[i] + eps) @ (sum(k[j] * outgoing[j] for j in range(m)) + eps)
        row = sum((q[i] @ k[j]) * v[j] * won[j] / won.sum() * m for j in range(m))
        rows.append(row * incoming[i] * torch.sigmoid(conserved * n / m))
    return torch.stack(rows)


def causal(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """One head, token by token; what a source won is settled when it comes."""
    q, k = 1 / (1 + torch.exp(-q)), 1 / (1 + torch.exp(-k))
    incoming, outgoing, won, comp, rows = [], [], [], [], []
    for t in range(len(q)):
        c = t + 1
        incoming.append(c / ((q[t] + eps) @ (sum(k[:c]) + eps)))
        outgoing.append(c / ((k[t] + eps) @ (sum(q[:c]) + eps)))
        sink = (q[t] + eps) @ (sum(k[j] * outgoing[j] for j in range(c)) + eps) / c
        source = (k[t] + eps) @ (sum(q[j] * incoming[j] for j in range(c)) + eps) / c
        won.append(source.clamp(-1, 1).exp())
        comp.append(won[t] / sum(won) * c)
        row = sum((q[t] @ k[j]) * v[j] * comp[j] for j in range(c))
        rows.append(row * incoming[t] / c * torch.sigmoid(sink))
    return torch.stack(rows)


def literal(one, q: Tensor, k: Tensor, v: Tensor, seen_q=None, seen_k=None, eps: float = 1e-6) -> Tensor:
    """Head by head, on the visible tokens alone; zeros elsewhere."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        own_q = range(q.shape[2]) if seen_q is None else seen_q[b].nonzero()[:, 0].tolist()
        own_k = range(k.shape[2]) if seen_k is None else seen_k[b].nonzero()[:, 0].tolist()
        for h in range(q.shape[1]):
            got = one(q[b, h, own_q], k[b, h, own_k], v[b, h, own_k], eps)
            out = out.index_put((torch.tensor(b), torch.tensor(h), torch.tensor(list(own_q))), got)
    return out


def assert_same_with_gradients(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected)]
    assert_close(*grads)


@pytest.mark.parametrize(("n", "m"), [(9, 9), (6, 11), (1, 5), (7, 4)])
def test_equals_the_sums_over_pairs(n, m):
    q, k, v = draw(n, m)
    assert_same_with_gradients(flow_attention(q, k, v), literal(full, q, k, v), [q, k, v])
    seen_q, seen_k = masks(n + 2, m + 2)
    q, k, v = draw(n + 2, m + 2)
    out = flow_attention(q, k, v, query_mask=seen_q, key_mask=seen_k, eps=0.1)
    assert_same_with_gradients(out, literal(full, q, k, v, seen_q, seen_k, 0.1), [q, k, v])


@pytest.mark.parametrize("n", [1, 3, 13])
@pytest.mark.parametrize("form", ["recurrent", "chunked", "auto"])
def test_causal_equals_the_sums_up_to_each_token(form, n):
    q, k, v = draw(n)
    out = flow_attention(q, k, v, causal=True, form=form)
    assert_same_with_gradients(out, literal(causal, q, k, v), [q, k, v])
    _, seen = masks(n + 4, n + 4)
    q, k, v = draw(n + 4)
    out = flow_attention(q, k, v, causal=True, key_mask=seen, form=form, eps=0.1)
    out = out.masked_fill(~seen[:, None, :, None], 0.0)
    assert_same_with_gradients(out, literal(causal, q, k, v, seen, seen, 0.1), [q, k, v])


def test_flow_is_conserved():
    q, k, v = (x.detach() for x in draw(6, 11))
    a, b = q.sigmoid(), k.sigmoid()
    incoming = 1 / (a * b.sum(2, keepdim=True)).sum(-1)
    outgoing = 1 / (b * a.sum(2, keepdim=True)).sum(-1)
    pairs = a @ b.mT
    assert_close((pairs * incoming[..., None]).sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    assert_close((pairs * outgoing[..., None, :]).sum(-2), torch.ones(2, 3, 11, dtype=torch.float64))
    # The same I and O inside: equal values all come through times competition and allocation.
    sink = (pairs * outgoing[..., None, :]).sum(-1)
    source = (pairs * incoming[..., None]).sum(-2).clamp(-1, 1)
    weight = pairs * incoming[..., None] * (source.softmax(-1) * 11)[..., None, :]
    allocation = (sink * 6 / 11).sigmoid()[..., None]
    assert_close(flow_attention(q, k, v, eps=0.0), weight @ v * allocation)


def test_the_first_causal_token_gets_its_own_value_gated():
    q, k, v = (x.detach()[:, :, :1] for x in draw(4))
    assert_close(flow_attention(q, k, v, causal=True, eps=0.0), v * torch.tensor(1.0).double().sigmoid())


def test_order_does_not_matter_without_causality():
    q, k, v = (x.detach() for x in draw(9))
    order = torch.randperm(9)
    assert_close(
        flow_attention(q[:, :, order], k[:, :, order], v[:, :, order]), flow_attention(q, k, v)[:, :, order]
    )


@settings(max_examples=20)
@given(
    n=st.integers(1, 30),
    cuts=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["recurrent", "chunked"])), max_size=4),
)
def test_cutting_a_sequence_changes_nothing(n, cuts):
    q, k, v = draw(n)
    whole, last = flow_attention(q, k, v, causal=True, return_state=True)
    state, start, parts = None, 0, []
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        piece = (x[:, :, start:stop] for x in (q, k, v))
        with patch.object(flow, "SEGMENT", 4):  # all segments but one are computed again in backward
            out, state = flow_attention(*piece, causal=True, state=state, return_state=True, form=form)
        parts.append(out)
        start = stop
    assert_same_with_gradients(torch.cat(parts, dim=2), whole, [q, k, v])
    assert_close(state, last)
    assert state.number.tolist() == [n, n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_64k_tokens_stay_near_float64(is_causal, scale, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (scale * torch.randn(1, 1, 65536, 8, generator=generator).to(dtype) for _ in range(3))
    out = flow_attention(q, k, v, causal=is_causal)
    exact = flow_attention(q.double(), k.double(), v.double(), causal=is_causal)
    assert out.isfinite().all()
    tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


def test_nothing_visible_gives_zeros():
    q, k, v = draw(5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    for call in (
        flow_attention(q, k, v, key_mask=nothing),
        flow_attention(q, k, v, query_mask=nothing, key_mask=nothing),
        flow_attention(q, k, v, key_mask=nothing, causal=True),
        flow_attention(q.float(), k.float(), v.float(), key_mask=nothing, causal=True),
    ):
        assert not call.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(call.sum(), (q, k, v)))


def build(**arguments) -> FlowAttention:
    torch.manual_seed(0)
    return create("flowformer", 12, heads=3, dtype=torch.float64, **arguments).eval()


def project(mixer: FlowAttention, x: Tensor, source: Tensor) -> list[Tensor]:
    maps = ((mixer.query, x), (mixer.key, source), (mixer.value, source))
    return [(y @ m.weight.T + m.bias).unflatten(-1, (3, -1)).transpose(1, 2) for m, y in maps]


@pytest.mark.parametrize("kind", ["full", "causal", "cross"])
def test_the_module(kind):
    mixer = build(causal=kind != "full", head_dim=5)
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    seen_x, seen_context = masks(9, 7)
    if kind == "cross":
        y = mixer(x, context=context, mask=seen_x, context_mask=seen_context)
        heads = literal(full, *project(mixer, x, context), seen_x, seen_context)
    else:
        y = mixer(x, mask=seen_x)
        one = full if kind == "full" else causal
        heads = literal(one, *project(mixer, x, x), seen_x, seen_x)
    expected = heads.transpose(1, 2).flatten(2) @ mixer.out.weight.T + mixer.out.bias
    shown = seen_x[..., None]
    assert_same_with_gradients(y * shown, expected * shown, [x, *mixer.parameters()])


def test_dropout_is_behind_the_output_projection():
    mixer, x = build(dropout=0.5).train(), torch.randn(2, 9, 12, dtype=torch.float64)
    y, kept = mixer(x), mixer.eval()(x)
    assert 0.2 < (y == 0).double().mean() < 0.8
    assert_close(y[y != 0], 2 * kept[y != 0])


def test_the_authors_names():
    mixer = build()
    theirs = {re.sub(r"\.", "_projection.", name): p + 1 for name, p in mixer.state_dict().items()}
    assert "out_projection.bias" in theirs
    wanted = mixer.query.weight + 1
    assert_close(authors.load(mixer, theirs).query.weight, wanted)


def test_parameters():
    count = sum(p.numel() for p in create("flowformer", 512, device="meta").parameters())
    assert count == 4 * (512**2 + 512)


@pytest.mark.compiled
def test_compiles_whole():
    q, k, v = draw(40)
    compiled = torch.compile(flow_attention, backend="aot_eager", fullgraph=True)
    for is_causal in (False, True):
        assert_close(compiled(q, k, v, causal=is_causal), flow_attention(q, k, v, causal=is_causal))


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, "form is 'fast', must be one of"),
        ({"query": torch.zeros(3, 5, 4)}, r"query has shape \(3, 5, 4\), must be \(b, h, n, d\)"),
        ({"key": torch.zeros(2, 3, 6, 4), "causal": True}, r"key has shape .*, must be \(2, 3, 5, 4\)"),
        ({"value": torch.zeros(2, 3, 4, 4)}, r"value has shape .*, must be \(2, 3, 5, e\)"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_mask has shape"),
        ({"query_mask": torch.ones(2, 5, dtype=torch.bool), "causal": True}, "query_mask is given, must be"),
        ({"return_state": True}, "return_state is given, must not be with causal=False"),
        ({"causal": True, "state": FlowState(*[torch.zeros(2)] * 7)}, "state has shapes"),
    ],
)
def test_errors(change, message):
    call = {
        "query": torch.zeros(2, 3, 5, 4),
        "key": torch.zeros(2, 3, 5, 4),
        "value": torch.zeros(2, 3, 5, 7),
    }
    with pytest.raises(ValueError, match=message):
        flow_attention(**{**call, **change})


@pytest.mark.door
def test_errors_of_the_module():
    x = torch.zeros(2, 5, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        create("flowformer", 12, heads=5)
    with pytest.raises(ValueError, match="causal is False, must be True to decode"):
        build().init_state(2)
    with pytest.raises(ValueError, match="state is given, must be None with a context"):
        build(causal=True)(x, context=x, state=build(causal=True).init_state(2))
    with pytest.raises(ValueError, match="context_mask is given, must come with a context"):
        build()(x, context_mask=torch.ones(2, 5, dtype=torch.bool))
