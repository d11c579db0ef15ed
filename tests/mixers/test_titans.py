from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, scatter, silu
from torch import Tensor
from torch.testing import assert_close

from heedful.mixers.linear.neural_memory import NeuralMemory, NeuralMemoryState
from heedful.mixers.linear.titans import TitansMAC, TitansMAG, TitansMAL
from heedful.models.decoder_lm import DecoderLM

KINDS = (TitansMAG, TitansMAL, TitansMAC)
MEMORY = {"expansion": 2, "chunk_size": 3, "heads": 2}


def build(kind: type, **arguments):
    torch.manual_seed(0)
    size = {"segment": 4} if kind is TitansMAC else {"window": 3}
    mixer = kind(8, **{"heads": 2, "persistent": 2, **size, **arguments}, memory=MEMORY, dtype=torch.float64)
    scatter(mixer)
    return mixer


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (c,) of two heads over the given keys and values (c,)."""
    heads = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        scores = torch.stack([(query[own] @ key[own] / 2).exp() for key in keys])
        heads.append(sum(s * v[own] for s, v in zip(scores, values, strict=True)) / scores.sum())
    return torch.cat(heads)


def windowed(z: Tensor, m) -> Tensor:
    """Attention over the persistent tokens and the last `window`, with the mixer's projections."""
    a, first = m.attention, len(m.persistent)
    q, k, v = (z @ p.weight.T for p in (a.query, a.key, a.value))
    rows = []
    for t in range(len(z)):
        seen = [j for j in range(t + 1) if j < first or t - j < m.window]
        rows.append(attended(q[t], [k[j] for j in seen], [v[j] for j in seen]))
    return torch.stack(rows) @ a.out.weight.T + a.out.bias


def normed(x: Tensor, norm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def told(memory: NeuralMemory, xs: list[Tensor], state: NeuralMemoryState) -> Tensor:
    """What a memory says to the last of the tokens xs: taps, heads, perceptron, norm and gate by hand."""
    taps = memory.query_conv.weight[:, 0]
    query = torch.zeros(8, dtype=torch.float64)
    for back, x in enumerate(reversed(xs[-taps.shape[1] :])):
        query = query + taps[:, -1 - back] * (memory.query.weight @ x)
    query = silu(query)
    heads = []
    for h in range(2):
        q = query[4 * h : 4 * h + 4]
        q = q / (q.square().sum() + 1e-6).sqrt()
        if state.weights is None:
            first, second = (layer[h] for layer in memory.memory)
        else:
            flat = state.weights[0, h]
            first, second = flat[:32].view(4, 8), flat[32:].view(8, 4)
        heads.append(normed(silu(q @ first) @ second, memory.norm))
    return memory.out.weight @ (torch.cat(heads) * silu(memory.gate.weight @ xs[-1]))


def literal(x: Tensor, m) -> Tensor:
    """One sequence (n, c)."""
    if isinstance(m, TitansMAC):
        state, before, rows = NeuralMemoryState(), NeuralMemoryState(), []
        for t in range(len(x)):
            if t % m.segment == 0:
                before, seen = state, [*m.persistent]
            seen += [told(m.memory, list(x[: t + 1]), before), x[t]]
            keys, values = ([p.weight @ token for token in seen] for p in (m.key, m.value))
            y = m.out.weight @ attended(m.query.weight @ x[t], keys, values)
            answer, state = m.memory(y[None, None], state=state)
            rows.append(y * answer[0, 0])
        return torch.stack(rows)
    z = torch.cat([m.persistent, x])
    memory = m.memory(z[None])[0]
    if isinstance(m, TitansMAL):
        o = windowed(memory, m)
    else:
        o = normed(windowed(z, m), m.attention_norm) * silu(normed(memory, m.memory_norm))
    return o[len(m.persistent) :]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_steps_token_by_token(kind):
    m = build(kind)
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), torch.stack([literal(row, m) for row in x]), [x, *m.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("persistent", [0, 2])
def test_cut_anywhere_and_the_state_stays_small(kind, persistent):
    m = build(kind, persistent=persistent)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    whole = m(x)
    state, parts, sizes = m.init_state(2), [], []
    for piece in x.split([1, 7, 1, 1, 12, 1, 1, 6], dim=1):
        y, state = m(piece, state=state)
        parts.append(y)
        sizes.append(state.nbytes())
    assert_close(torch.cat(parts, 1), whole)
    assert state.length == 30
    most = 8 if kind is TitansMAC else 2  # keys and values beside the persistent ones
    assert state.seen.key.shape[2] <= persistent + most
    turned = state.reorder(torch.tensor([1, 0]))
    y, _ = m(x[:, :3], state=state)
    other, _ = m(x[:, :3].flip(0), state=turned)
    assert_close(other.flip(0), y)


@pytest.mark.parametrize("name", ["titans-mag", "titans-mal", "titans-mac"])
def test_a_small_language_model_decodes(name):
    torch.manual_seed(0)
    arguments = {"heads": 2, "memory": {"expansion": 1, "chunk_size": 4}}
    model = DecoderLM(20, 8, depth=2, mixers=(name, arguments)).double().eval()
    ids = torch.randint(20, (2, 9))
    state, parts = model.init_state(2), []
    for piece in ids.split([4, 1, 4], dim=1):
        out = model(piece, state=state)
        state = out.state
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), model(ids).logits)


@pytest.mark.door
@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind):
    with pytest.raises(ValueError, match="persistent is -1, must be a whole number of at least 0"):
        build(kind, persistent=-1)
    name = "segment" if kind is TitansMAC else "window"
    with pytest.raises(ValueError, match=f"{name} is 0"):
        build(kind, **{name: 0})
