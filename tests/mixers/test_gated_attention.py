"""Gated attention: every gate position against loops over heads, the layout of the gates, decoding."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.gated_attention import GatedAttention

CASES = [
    (gate, position)
    for position in ("output", "value", "key", "query", "final")
    for gate in ("elementwise", "headwise", "shared", "constant")
    if not (gate == "headwise" and position in ("key", "query", "final"))
    and not (gate == "shared" and position == "final")
]


def build(**options):
    torch.manual_seed(0)
    mixer = GatedAttention(**{"dim": 12, "heads": 4, "kv_heads": 2, "head_dim": 6, **options}).double()
    for q in mixer.parameters():
        torch.nn.init.normal_(q, std=0.5)
    return mixer


def literal(mixer, x, gate, position, causal, qk_norm=True, rotary=True):
    """Steps 1 to 4 of the card, one head at a time; row numbers of W_q counted by hand."""
    t = x.shape[1]
    heads, groups, d = mixer.heads, mixer.kv_heads, mixer.head_dim
    n, width = heads // groups, 1 if gate == "headwise" else d
    inside = width if position == "output" and gate in ("elementwise", "headwise") else 0
    act = {
        "sigmoid": lambda z, g: z / (1 + (-g).exp()),
        "silu": lambda z, g: z * g / (1 + (-g).exp()),
        "ns-sigmoid": lambda z, g: z * (0.5 + 0.5 / (1 + (-g).exp())),
        "additive": lambda z, g: z + g / (1 + (-g).exp()),
    }[mixer.gate_form]

    def logits_of(h):
        if gate == "constant":
            return mixer.gate_logits[h]
        return rows(mixer.gate, 0, d) if gate == "shared" else rows(mixer.gate, h * width, width)

    def rows(layer, first, count):
        bias = 0 if layer.bias is None else layer.bias[first : first + count]
        return x @ layer.weight[first : first + count].T + bias

    def norm(z, weight):
        return z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(z):
        angle = torch.arange(t, dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        u, v = z[..., : d // 2], z[..., d // 2 :]
        return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)

    outs = []
    for h in range(heads):
        g, place = h // n, h % n
        start = g * n * (d + inside)  # the group's first row
        q = rows(mixer.query, start + place * d, d)
        k, v = rows(mixer.key, g * d, d), rows(mixer.value, g * d, d)
        if position == "query":
            q = act(q, logits_of(h))
        if position == "key":
            k = act(k, logits_of(g))
        if position == "value":
            v = act(v, logits_of(g))
        if qk_norm:
            q, k = norm(q, mixer.query_norm.weight), norm(k, mixer.key_norm.weight)
        if rotary:
            q, k = turn(q), turn(k)
        logits = q @ k.mT / d**0.5
        if causal:
            logits = logits.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        o = logits.softmax(-1) @ v
        if position == "output":
            o = act(o, rows(mixer.query, start + n * d + place * width, width) if inside else logits_of(h))
        outs.append(o)
    y = mixer.out(torch.cat(outs, -1))
    if position == "final":
        y = act(y, mixer.gate_logits if gate == "constant" else mixer.gate(x))
    return y


def same_with_gradients(mixer, ours, expected, x):
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(("gate", "position"), CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_card(gate, position, causal):
    mixer = build(gate=gate, gate_position=position, causal=causal, qkv_bias=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    same_with_gradients(mixer, mixer(x), literal(mixer, x, gate, position, causal), x)


@pytest.mark.parametrize("form", ["silu", "ns-sigmoid", "additive"])
@pytest.mark.parametrize(
    ("gate", "position"), [("elementwise", "output"), ("headwise", "value"), ("shared", "key")]
)
def test_other_forms_equal_the_card(gate, position, form):
    mixer = build(gate=gate, gate_position=position, gate_form=form)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    same_with_gradients(mixer, mixer(x), literal(mixer, x, gate, position, True), x)


@pytest.mark.parametrize("position", ["query", "key"])
def test_headwise_gates_of_queries_and_keys_without_norm(position):
    mixer = build(gate="headwise", gate_position=position, qk_norm=False, rotary_base=None)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = literal(mixer, x, "headwise", position, True, qk_norm=False, rotary=False)
    same_with_gradients(mixer, mixer(x), expected, x)


def gate_rows(mixer):
    """Which rows of `query` make gates."""
    group = mixer.heads // mixer.kv_heads
    rows = torch.arange(mixer.query.weight.shape[0]) % (group * (mixer.head_dim + mixer.fused))
    return rows >= group * mixer.head_dim


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize(("logit", "share"), [(0.0, 0.5), (60.0, 1.0)])
def test_zero_gates_halve_and_open_gates_leave_attention(gate, logit, share):
    gated, plain = build(gate=gate, qkv_bias=True), build(gate=None, qkv_bias=True)
    rows = gate_rows(gated)
    weights = gated.state_dict()
    weights["query.weight"][rows], weights["query.bias"][rows] = 0.0, logit
    weights["out.bias"].zero_()
    shared = {name: w for name, w in weights.items() if not name.startswith("query.")}
    shared |= {name: weights[name][~rows] for name in ("query.weight", "query.bias")}
    plain.load_state_dict(shared, strict=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(gated(x), share * plain(x))


def test_extra_parameters_of_the_papers_dense_model():
    def count(gate):
        mixer = GatedAttention(2048, heads=16, kv_heads=8, head_dim=128, gate=gate, device="meta")
        return sum(q.numel() for q in mixer.parameters())

    assert count("headwise") - count(None) == 32_768
    assert count("elementwise") - count(None) == 4_194_304
    assert count("shared") - count(None) == 2048 * 128
    assert count("constant") - count(None) == 2048
    assert count(None) == 2 * 2048 * 2048 + 2 * 2048 * 1024 + 2 * 128


def test_gates_start_near_a_half():
    torch.manual_seed(0)
    mixer = GatedAttention(64, heads=4)
    gate = mixer.project(torch.randn(4, 32, 64))[3]
    assert gate.shape == (4, 4, 32, 16)
    assert abs(gate.mean() - 0.5) < 0.01
    assert gate.std() < 0.06


@pytest.mark.parametrize(("gate", "position"), CASES)
def test_pieces_equal_the_whole(gate, position):
    mixer = build(gate=gate, gate_position=position)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3] = False
    state, pieces = mixer.init_state(2), []
    for part, seen in zip(x.split((3, 1, 1, 3), 1), mask.split((3, 1, 1, 3), 1), strict=True):
        y, state = mixer(part, mask=seen, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x, mask=mask))
    torch.testing.assert_close(mixer(x, positions=torch.arange(8) + 50), mixer(x))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="gate is 'headwise', must be 'elementwise' at 'final'"):
        GatedAttention(16, gate="headwise", gate_position="final")
    with pytest.raises(ValueError, match="gate is 'shared', must be 'elementwise' at 'final'"):
        GatedAttention(16, gate="shared", gate_position="final")
    with pytest.raises(ValueError, match="gate_form is 'relu'"):
        GatedAttention(16, gate_form="relu")
    with pytest.raises(ValueError, match="undoes"):
        GatedAttention(16, gate="headwise", gate_position="key")
    with pytest.raises(ValueError, match="gate is 'soft'"):
        GatedAttention(16, gate="soft")
    with pytest.raises(ValueError, match="gate_position is 'input'"):
        GatedAttention(16, gate_position="input")
    with pytest.raises(ValueError, match="causal is False"):
        GatedAttention(16, causal=False).init_state(1)
