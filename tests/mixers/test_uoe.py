"""Union of Experts: attention and perceptron in loops, the whole layers they are cut from, the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.heads.selective_multi_head_attention import SelectiveMultiHeadAttention
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.heads.union_mlp import UnionMLP
from heedful.models.decoder_lm import DecoderLM
from heedful.routing.head_gate import load_balance
from heedful.routing.sequence_gate import SequenceGate
from heedful.routing.switch_gate import SwitchGate
from heedful.testing import check_mixer


def attention(**options):
    mixer = SelectiveMultiHeadAttention(
        12, **{"heads": 3, "topk": 2, "dropout": 0.0, "dtype": torch.float64, **options}
    )
    torch.nn.init.normal_(mixer.out_bias)
    torch.nn.init.normal_(mixer.kv.bias)
    return mixer


def perceptron(**options):
    mixer = UnionMLP(5, **{"hidden": 12, "experts": 4, "dropout": 0.0, "dtype": torch.float64, **options})
    torch.nn.init.normal_(mixer.inner_bias)
    torch.nn.init.normal_(mixer.outer_bias)
    return mixer


def assert_same_with_gradients(x, parameters, ours, expected):
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    leaves = [x, *parameters]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves, materialize_grads=True, allow_unused=True),
        torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True, allow_unused=True),
    )


def best(gate, token):
    """Probabilities of a token and the numbers of its experts."""
    s = (gate.linear.weight @ token + gate.linear.bias).exp()
    s = s / s.sum()
    return s, sorted(range(len(s)), key=lambda e: -s[e])[: gate.topk]


def turned(z, place, base):
    d = len(z)
    angle = place * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[: d // 2], z[d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()])


def literal_attention(mixer, row, lists, gates=None):
    """lists: for each head its tokens, ascending."""
    d, base = mixer.head_dim, mixer.rotary_base
    y = [torch.zeros_like(token) for token in row]
    for e, tokens in enumerate(lists):
        own = slice(e * d, (e + 1) * d)
        kv = slice(2 * e * d, 2 * (e + 1) * d)
        queries, keys, values = [], [], []
        for place, t in enumerate(tokens):
            q = mixer.query.weight[own] @ row[t] + mixer.query.bias[own]
            k, v = (mixer.kv.weight[kv] @ row[t] + mixer.kv.bias[kv]).split(d)
            queries.append(turned(q, place, base))
            keys.append(turned(k, place, base))
            values.append(v)
        for place, t in enumerate(tokens):
            weight = [(queries[place] @ k / d**0.5).exp() for k in keys[: place + 1]]
            o = sum(w * v for w, v in zip(weight, values, strict=False)) / sum(weight)
            out = o @ mixer.out[e] + mixer.out_bias[e]
            y[t] = y[t] + (out if gates is None else gates[t][e] * out)
    return torch.stack(y)


@pytest.mark.parametrize("gate_output", [False, True])
def test_attention_equals_the_card_with_strict_choices(gate_output):
    mixer = attention(gate_output=gate_output, rotary_base=30.0)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 7, [False, True, True, False, True, True, True]])
    rows = []
    for row, shown in zip(x, mask, strict=True):
        choices = [best(mixer.gate, token) for token in row]
        lists = [[t for t in range(7) if shown[t] and e in choices[t][1]] for e in range(3)]
        rows.append(literal_attention(mixer, row, lists, [s for s, _ in choices] if gate_output else None))
    ours = mixer(x, mask=mask)
    assert_same_with_gradients(x, mixer.parameters(), ours[mask], torch.stack(rows)[mask])


def literal_published(gate, x, length):
    """r (b, n, e) and, row by row and expert by expert, the tokens with the largest r."""
    b, n, _ = x.shape
    s = torch.zeros(b, n, gate.linear.out_features, dtype=x.dtype)
    for i in range(b):
        for t in range(n):
            p, experts = best(gate, x[i, t])
            s[i, t, experts] = p[experts]
    r = torch.stack([s[i] / (sum(s) + 1e-8) * b for i in range(b)])
    length = int((r > 0).sum(1).max()) if length is None else length
    lists = [
        [sorted(sorted(range(n), key=lambda t: -r[i, t, e])[:length]) for e in range(s.shape[2])]
        for i in range(b)
    ]
    return r, lists


def test_attention_equals_the_card_with_published_choices():
    mixer = attention(selection="paper")
    x = torch.randn(3, 8, 12, dtype=torch.float64, requires_grad=True)
    # Which tokens fill a list up is arbitrary; here as many as the shortest list is long.
    short = int((mixer.gate.published(x)[0] > 0).sum(1).min())
    published = mixer.gate.published
    mixer.gate.published = lambda x: published(x, length=short)
    r, lists = literal_published(mixer.gate, x, short)
    torch.testing.assert_close(published(x)[0], r)
    expected = torch.stack([literal_attention(mixer, row, of) for row, of in zip(x, lists, strict=True)])
    assert_same_with_gradients(x, [mixer.out, mixer.kv.weight], mixer(x), expected)


def test_published_lists_are_as_long_as_the_fullest():
    gate = SwitchGate(5, experts=4, topk=2, dtype=torch.float64)
    r, selected = gate.published(torch.randn(3, 9, 5, dtype=torch.float64))
    counts = (r > 0).sum(1)
    assert (selected.sum(1) == counts.max()).all()
    assert (selected | ~(r > 0)).all()  # nobody who was chosen is left out
    total = r.sum(0)[r.sum(0) > 0]
    # eps = 1e-8 beside sums that can be as small as a hundredth
    torch.testing.assert_close(total, torch.full_like(total, 3.0), rtol=1e-5, atol=0.0)


SEQUENCES = {"selection": "sequence", "length": 8}


def best_of_sequence(gate, row):
    """Probabilities of a sequence and the numbers of its experts; a short one is as if zeros followed."""
    width = gate.linear.in_features
    return best(gate, torch.cat([row.flatten(), row.new_zeros(width - row.numel())]))


@pytest.mark.parametrize("gate_output", [False, True])
@pytest.mark.parametrize("n", [8, 6])
def test_heads_run_on_the_sequences_that_chose_them(gate_output, n):
    torch.manual_seed(0)
    mixer = attention(gate_output=gate_output, rotary_base=30.0, **SEQUENCES)
    x = torch.randn(6, n, 12, dtype=torch.float64, requires_grad=True)
    rows, choices = [], set()
    for row in x:
        s, experts = best_of_sequence(mixer.gate, row)
        choices.add(tuple(sorted(experts)))
        lists = [list(range(n)) if e in experts else [] for e in range(3)]
        rows.append(literal_attention(mixer, row, lists, n * [s] if gate_output else None))
    assert len(choices) > 1
    assert_same_with_gradients(x, mixer.parameters(), mixer(x), torch.stack(rows))


@pytest.mark.parametrize("gate_output", [False, True])
@pytest.mark.parametrize("n", [8, 6])
def test_experts_run_on_the_sequences_that_chose_them(gate_output, n):
    torch.manual_seed(0)
    mixer = perceptron(gate_output=gate_output, **SEQUENCES)
    x = torch.randn(6, n, 5, dtype=torch.float64, requires_grad=True)
    rows, choices = [], set()
    for row in x:
        s, experts = best_of_sequence(mixer.gate, row)
        choices.add(tuple(sorted(experts)))
        y = torch.zeros_like(row)
        for e in experts:
            out = F.gelu(row @ mixer.inner[e] + mixer.inner_bias[e]) @ mixer.outer[e] + mixer.outer_bias[e]
            y = y + (s[e] * out if gate_output else out)
        rows.append(y)
    assert len(choices) > 1
    assert_same_with_gradients(x, mixer.parameters(), mixer(x), torch.stack(rows))


def test_a_head_sees_no_sequence_but_its_own(monkeypatch):
    mixer, seen = attention(**SEQUENCES), []
    x = torch.randn(5, 8, 12, dtype=torch.float64)
    plain = F.linear

    def counted(x, weight, bias=None):
        seen.append((tuple(weight.shape), len(x)))
        return plain(x, weight, bias)

    _, taken = mixer.gate(x)
    monkeypatch.setattr(F, "linear", counted)
    mixer(x)
    rows = taken[:, 0].sum(0).tolist()
    assert [n for shape, n in seen if shape == (4, 12)] == rows  # queries
    assert [n for shape, n in seen if shape == (8, 12)] == rows  # keys and values
    assert [n for shape, n in seen if shape == (12, 4)] == rows  # outputs
    assert sum(rows) == 5 * 2


@pytest.mark.parametrize("made", [attention, perceptron])
def test_sequences_of_a_batch_stand_alone(made):
    mixer = made(**SEQUENCES)
    x = torch.randn(6, 7, mixer.dim, dtype=torch.float64)
    y, order = mixer(x), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(mixer(x[order]), y[order])
    torch.testing.assert_close(torch.cat([mixer(row[None]) for row in x]), y)


def test_the_choice_of_a_sequence_sees_the_future():
    mixer = attention(**SEQUENCES, gate_output=True)
    x = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    assert not mixer.causal
    (grad,) = torch.autograd.grad(mixer(x)[:, 0].sum(), x)
    assert grad[:, 1:].abs().sum() > 0
    for name in ("selective-multi-head-attention", "union-mlp"):
        sizes = {"selection": "sequence", "length": 8}
        with pytest.raises(ValueError, match=f"names '{name}', which sees the future as it is built"):
            DecoderLM(11, 12, depth=1, heads=3, mixers=(name, sizes))


@pytest.mark.parametrize(
    "name",
    [
        "padding",
        "padded_equals_shorter",
        "all_masked_row",
        "batch_rows",
        "gradient_values",
        "parameter_gradients",
        "odd_sizes",
        "empty_input",
        "float64",
        "bfloat16",
        "autocast",
        "pickling",
        "deepcopying",
        "state_dict",
        "activation_checkpointing",
        "determinism",
        "aux_losses",
    ],
)
@pytest.mark.parametrize("made", [SelectiveMultiHeadAttention, UnionMLP])
def test_conformance_with_sequences(made, name):
    def built():
        return made(**made.example, selection="sequence", length=40, gate_output=True)

    check_mixer(built, only=[name])


def test_the_gate_of_sequences():
    gate = SequenceGate(5, experts=4, topk=2, length=8, dtype=torch.float64)
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    s, taken = gate(x)
    torch.testing.assert_close(s[:, 0], gate.linear(x.flatten(1)).softmax(-1))
    assert (taken.sum(-1) == 2).all()
    assert s.masked_fill(~taken, 2.0).amin() >= s.masked_fill(taken, -1.0).amax(-1).amin()
    assert ((s * taken).amax(-1) == s.amax(-1)).all()
    mask = torch.arange(8) < torch.tensor([8, 5, 0])[:, None]
    masked, _ = gate(x, mask=mask)
    torch.testing.assert_close(masked[1:2], gate(x[1:2, :5])[0])
    torch.testing.assert_close(masked[2, 0], gate.linear.bias.softmax(-1))


def test_all_heads_for_all_tokens_are_multi_head_attention():
    mixer = attention(topk=3)
    plain = SelfAttention(12, heads=3, causal=True, rotary=True, dtype=torch.float64)
    k, v = (w.flatten(0, 1) for w in mixer.kv.weight.unflatten(0, (3, 2, 4)).unbind(1))
    kb, vb = (w.flatten() for w in mixer.kv.bias.unflatten(0, (3, 2, 4)).unbind(1))
    plain.load_state_dict(
        {
            "query.weight": mixer.query.weight,
            "query.bias": mixer.query.bias,
            "key.weight": k,
            "key.bias": kb,
            "value.weight": v,
            "value.bias": vb,
            "out.weight": mixer.out.flatten(0, 1).T,
            "out.bias": mixer.out_bias.sum(0),
        }
    )
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))
    mixer.selection = "paper"
    torch.testing.assert_close(mixer(x), plain(x))
    mixer.gate = attention(topk=3, **SEQUENCES).gate
    torch.testing.assert_close(mixer(x), plain(x))
    mask = torch.tensor([[True] * 7, [False, True, True, False, True, True, True]])
    mixer.selection = "sequence"
    torch.testing.assert_close(
        mixer(x, mask=mask)[mask], plain(x, mask=mask, positions=mask.long().cumsum(1) - 1)[mask]
    )


def test_decoding_keeps_the_chosen_heads_alone():
    mixer = attention()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 4), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state.nbytes() == 2 * 9 * (2 * 2 * 4 * 8 + 2 * 2)  # k and v of 2 heads, and their names


@pytest.mark.parametrize("gate_output", [False, True])
def test_perceptron_equals_the_card(gate_output):
    mixer = perceptron(gate_output=gate_output)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x.flatten(0, 1):
        s, experts = best(mixer.gate, token)
        y = torch.zeros(5, dtype=torch.float64)
        for e in experts:
            out = F.gelu(token @ mixer.inner[e] + mixer.inner_bias[e]) @ mixer.outer[e] + mixer.outer_bias[e]
            y = y + (s[e] * out if gate_output else out)
        rows.append(y)
    expected = torch.stack(rows).view(2, 6, 5)
    assert_same_with_gradients(x, mixer.parameters(), mixer(x), expected)


@pytest.mark.parametrize("how", [{}, SEQUENCES])
def test_all_experts_are_the_whole_perceptron(how):
    mixer = perceptron(topk=4, **how)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    inner = F.gelu(x @ torch.cat([*mixer.inner], 1) + mixer.inner_bias.flatten())
    torch.testing.assert_close(mixer(x), inner @ mixer.outer.flatten(0, 1) + mixer.outer_bias.sum(0))


def test_published_experts_take_half_of_the_tokens():
    mixer = perceptron(selection="paper", topk=3)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    _, lists = literal_published(mixer.gate, x, 3)
    expected = torch.zeros_like(x)
    for i, of_row in enumerate(lists):
        for e, tokens in enumerate(of_row):
            for t in tokens:
                inner = F.gelu(x[i, t] @ mixer.inner[e] + mixer.inner_bias[e])
                expected[i, t] += inner @ mixer.outer[e] + mixer.outer_bias[e]
    torch.testing.assert_close(mixer(x), expected)


def test_losses_train_the_gate():
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for mixer in (attention(), attention(selection="paper")):
        mixer(x)
        loss = mixer.aux_losses["load_balance"]
        torch.testing.assert_close(loss, 0.01 * load_balance(*mixer.gate(x)))
        assert torch.autograd.grad(loss, mixer.gate.linear.weight)[0].abs().sum() > 0
        mixer.eval()(x)
        assert mixer.aux_losses == {}


def test_losses_of_sequences():
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 2, 0])[:, None]
    mixer = attention(**SEQUENCES, load_balance=0.5)
    mixer(x, mask=mask)
    s = torch.stack(
        [best_of_sequence(mixer.gate, row[shown])[0] for row, shown in zip(x[:2], mask, strict=False)]
    )
    used = torch.stack([(p >= p.sort().values[-2]).double() for p in s])
    expected = 0.5 * 3 * (used.mean(0) * s.mean(0)).sum()  # a sequence counts once, an empty one does not
    loss = mixer.aux_losses["load_balance"]
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, mixer.gate.linear.weight)[0].abs().sum() > 0
    mixer = UnionMLP(12, hidden=8, load_balance=0.5, dtype=torch.float64, **SEQUENCES)
    mixer(x, mask=mask)
    s, taken = mixer.gate(x[:2], mask=mask[:2])
    torch.testing.assert_close(
        mixer.aux_losses["load_balance"], 0.5 * 4 * (taken.double().mean((0, 1)) * s.mean((0, 1))).sum()
    )


def test_parameters():
    def count(mixer):
        return sum(p.numel() for p in mixer.parameters())

    heads, dim = 10, 400  # of the published language models
    smha = SelectiveMultiHeadAttention(dim, heads=heads, device="meta")
    assert count(smha) == 4 * dim * dim + 3 * dim + heads * dim + heads * dim + heads
    uome = UnionMLP(dim, hidden=2100, device="meta")
    assert count(uome) == 2 * dim * 2100 + 2100 + 4 * dim + 4 * dim + 4


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="topk is 4, must be at most 3"):
        attention(topk=4)
    with pytest.raises(ValueError, match="heads is 4, must leave an even number"):
        attention(heads=4)
    with pytest.raises(ValueError, match="experts is 5, must divide hidden"):
        perceptron(experts=5)
    for made in (attention, perceptron):
        with pytest.raises(ValueError, match="length is None, must be the largest number of tokens"):
            made(selection="sequence")
        with pytest.raises(ValueError, match="length is 0, must be a whole number of at least 1"):
            made(selection="sequence", length=0)
        with pytest.raises(ValueError, match="length is 8, must be None with selection='strict'"):
            made(length=8)
        mixer = made(**SEQUENCES)
        with pytest.raises(ValueError, match="x has 9 tokens, must have at most length, which is 8"):
            mixer(torch.zeros(1, 9, mixer.dim, dtype=torch.float64))
        with pytest.raises(ValueError, match="selection is 'sequence', must be 'strict' to decode"):
            mixer.init_state(1)
    with pytest.raises(ValueError, match="state is given, must be None with selection='sequence'"):
        attention(**SEQUENCES)(torch.zeros(1, 3, 12, dtype=torch.float64), state=attention().init_state(1))
    with pytest.raises(ValueError, match="selection is 'sequence', must be 'strict' or 'paper'"):
        attention(**SEQUENCES).published(torch.zeros(1, 3, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="topk is 5, must be at most 4"):
        SequenceGate(5, experts=4, topk=5, length=8)
    for mixer in (attention(selection="paper"), perceptron(selection="paper")):
        x = torch.zeros(1, 3, mixer.dim, dtype=torch.float64)
        with pytest.raises(ValueError, match="selection is 'paper', must be 'strict' to decode"):
            mixer.init_state(1)
        with pytest.raises(ValueError, match="mask is given, must be None with selection='paper'"):
            mixer(x, mask=torch.ones(1, 3, dtype=torch.bool))
