from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, layer_norm, scatter, silu
from torch import Tensor
from torch.testing import assert_close

from heedful import authors
from heedful.mixers.linear.lightning_attention_2 import LightningAttention2
from heedful.mixers.linear.tnl_attention import TNLAttention
from heedful.models.transnormer_llm import TransNormerLLM

HEADS6 = (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8)


def build(**arguments) -> TNLAttention:
    torch.manual_seed(0)
    mixer = TNLAttention(12, **arguments, dtype=torch.float64)
    scatter(mixer)
    return mixer


def recurrence(q: Tensor, k: Tensor, v: Tensor, rates: list[float]) -> Tensor:
    """(h, n, d): the state of each head, token by token."""
    heads = []
    for h, rate in enumerate(rates):
        matrix, rows = torch.zeros(q.shape[-1], v.shape[-1], dtype=torch.float64), []
        for q_t, k_t, v_t in zip(q[h], k[h], v[h], strict=True):
            matrix = 2.718281828459045**-rate * matrix + torch.outer(k_t, v_t)
            rows.append(q_t @ matrix)
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1)


def literal(x: Tensor, m: TNLAttention, rates: list[float], mask: Tensor) -> Tensor:
    """One sequence (n, c)."""

    def linear(layer, x):
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    q, k, v = (
        silu(linear(p, x)).unflatten(1, (m.heads, -1)).transpose(0, 1) for p in (m.query, m.key, m.value)
    )
    o = layer_norm(recurrence(q, k, v * mask[None, :, None], rates), m.norm)
    gate = 1 / (1 + torch.exp(-(x @ m.gate[0].weight.T @ m.gate[1].weight.T)))
    return linear(m.out, o * gate)


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({"heads": 4}, [s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)]),
        ({"heads": 6, "layer_index": 1, "layers": 5, "bias": True}, [s * (3 / 4 + 1e-5) for s in HEADS6]),
        ({"heads": 2, "layer_index": 4, "layers": 5}, [1e-5 / 16, 1e-5 / 256]),
    ],
)
def test_equals_the_recurrence(arguments, rates):
    m = build(**arguments)
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = mask[1, :2] = False
    expected = torch.stack([literal(*pair, m, rates, s) for *pair, s in ((x[0], mask[0]), (x[1], mask[1]))])
    assert_same_with_gradients(m(x, mask=mask), expected, [x, *m.parameters()])


def test_lrpe_sees_distances():
    torch.manual_seed(1)
    m = LightningAttention2(12, heads=3, layer_index=1, layers=4, lrpe=True, dtype=torch.float64)
    place = torch.arange(12, dtype=torch.float64)
    assert_close(m.theta.flatten(), 10000 ** (-2 * place / 12))
    scatter(m)
    x = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    q, k, v, u = (x[0] @ m.qkvu_proj.weight.T).unflatten(1, (4, 3, 4)).permute(1, 2, 0, 3)
    q, k = silu(q), silu(k)
    heads = []
    for h in range(3):
        rows = []
        for t in range(8):
            o = 0.0
            for j in range(t + 1):
                score = (q[h, t] * k[h, j] * torch.cos(m.theta[h, 0] * (t - j))).sum()
                o = o + 2.718281828459045 ** (m.log_decay[h] * (t - j)) * score * v[h, j]
            rows.append(o)
        heads.append(torch.stack(rows))
    o = torch.cat(heads, -1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (u.transpose(0, 1).flatten(1) * o) @ m.out_proj.weight.T
    assert_same_with_gradients(m(x), expected[None], [x, *m.parameters()])
    assert_close(m(x, positions=torch.arange(5, 13)), m(x))


def test_lrpe_continues_from_the_state():
    m = LightningAttention2(12, heads=3, lrpe=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    state, parts = m.init_state(2), []
    for piece in x.split([4, 1, 1, 3], dim=1):
        y, state = m(piece, state=state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), m(x))


def test_the_authors_names():
    m = build(heads=3)
    theirs = {
        "q_proj.weight": m.query.weight,
        "k_proj.weight": m.key.weight,
        "v_proj.weight": m.value.weight,
        "o_proj.weight": m.out.weight,
        "norm.weight": m.norm.weight,
        "norm.bias": m.norm.bias,
        "output_gate.0.weight": m.gate[0].weight,
        "output_gate.1.weight": m.gate[1].weight,
    }
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    other = authors.load(TNLAttention(12, heads=3, dtype=torch.float64), theirs)
    assert torch.equal(other(x), m(x))


def model() -> TransNormerLLM:
    torch.manual_seed(0)
    found = TransNormerLLM(20, 8, depth=3, heads=2, hidden=12, dtype=torch.float64)
    scatter(found)
    return found


def test_model_equals_its_steps():
    m = model()
    ids = torch.randint(20, (2, 7))

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = m.embed.weight[ids] * 8**0.5
    for i, layer in enumerate(m.layers):
        assert (layer.mixer.theta is not None) == (i == 0)
        x = x + layer.mixer(norm(x))
        w1, w2, w3 = (part.weight for part in (layer.mlp.l1, layer.mlp.l2, layer.mlp.l3))
        x = x + ((norm(x) @ w1.T) * (norm(x) @ w2.T)) @ w3.T
    assert_same_with_gradients(m(ids), norm(x) @ m.head.weight.T, list(m.parameters()))
    ratio = m.layers[1].mixer.log_decay[0] / m.layers[0].mixer.log_decay[0]
    assert_close(ratio, (0.5 + 1e-5) / (1 + 1e-5))


def test_model_decodes():
    m, ids = model(), torch.randint(20, (2, 9))
    state, parts = m.init_state(2), []
    for piece in ids.split([5, 1, 3], dim=1):
        logits, state = m(piece, state=state)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), m(ids))
    assert state.length == 9
    mask = torch.arange(9)[None].expand(2, -1) >= torch.tensor([[0], [4]])
    assert_close(m(ids, mask=mask)[1, 4:], m(ids[1:, 4:])[0])


def test_model_has_the_released_parameters_and_names():
    m = TransNormerLLM(device="meta")
    layers = sum(p.numel() for p in m.layers.parameters())
    assert layers == 333_447_168 + 1024  # and theta of the first layer
    assert sum(p.numel() for p in m.parameters()) == layers + 2 * 65_536_000
    small = model()
    theirs = {}
    for name, value in small.state_dict().items():
        name = name.replace("layers.", "model.layers.").replace(".mixer.", ".token_mixer.")
        name = name.replace("token_mixer.theta", "token_mixer.lrpe.theta").replace(".mlp.", ".channel_mixer.")
        name = name.replace("embed.", "model.embed_tokens.").replace("head.", "lm_head.")
        theirs[name] = value
    other = TransNormerLLM(20, 8, depth=3, heads=2, hidden=12, dtype=torch.float64)
    ids = torch.randint(20, (1, 6))
    assert torch.equal(authors.load(other, theirs)(ids), small(ids))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="layer_index is 4, must be from 0 to 3"):
        TNLAttention(12, heads=3, layer_index=4, layers=4)
    with pytest.raises(ValueError, match="depth is 0"):
        TransNormerLLM(20, 8, depth=0)
