"""Composite attention: the split computation against the dense layer under the mask, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import heedful
from heedful import patterns as p
from heedful.mixers.heads.ee_mllm import CompositeAttentionLayer

N = 7


def build(**options):
    torch.manual_seed(0)
    options = {"dim": 12, "heads": 6, "kv_heads": 2, "hidden": 7, "rotary_base": 50.0, **options}
    mixer = CompositeAttentionLayer(**options).double()
    for q in mixer.parameters():
        nn.init.normal_(q, std=0.6)
    x = torch.randn(2, N, 12, dtype=torch.float64, requires_grad=True)
    visual = torch.tensor(
        [[True, True, False, True, False, False, False], [False] * 4 + [True] * 2 + [False]]
    )
    return mixer, x, visual


def literal(mixer, x, visual, positions=None):
    """The unmodified layer with a dense mask, token by token and head by head."""
    d, repeats = mixer.head_dim, mixer.heads // mixer.kv_heads
    positions = range(N) if positions is None else positions

    def norm(u, weight):
        return u / (u.pow(2).mean() + 1e-5).sqrt() * weight

    def turn(u, t):
        out = []
        for j in range(d):
            angle = torch.tensor(t * 50.0 ** (-2 * (j % (d // 2)) / d), dtype=u.dtype)
            other = -u[j + d // 2] if j < d // 2 else u[j - d // 2]
            out.append(u[j] * angle.cos() + other * angle.sin())
        return torch.stack(out)

    rows = []
    for b in range(x.shape[0]):
        u = [norm(x[b, t], mixer.attention_norm.weight) for t in range(N)]
        tokens = []
        for t in range(N):
            sees = [t] if visual[b, t] else list(range(t + 1))
            heads = []
            for h in range(mixer.heads):
                own, group = slice(h * d, h * d + d), slice(h // repeats * d, h // repeats * d + d)
                q = turn(mixer.query.weight[own] @ u[t], positions[t])
                keys = torch.stack([turn(mixer.key.weight[group] @ u[s], positions[s]) for s in sees])
                values = torch.stack([mixer.value.weight[group] @ u[s] for s in sees])
                heads.append((keys @ q / d**0.5).softmax(0) @ values)
            step = mixer.out.weight @ torch.cat(heads)
            if visual[b, t] and mixer.aligner != "value":
                step = torch.zeros_like(step)
            z = x[b, t] + step
            w = norm(z, mixer.ffn_norm.weight)
            gate = mixer.ffn.gate.weight @ w
            y = z + mixer.ffn.down.weight @ (gate * gate.sigmoid() * (mixer.ffn.up.weight @ w))
            tokens.append(x[b, t] if visual[b, t] and mixer.aligner == "none" else y)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("aligner", ["value", "ffn_only", "none"])
def test_equals_the_dense_layer_under_the_mask(aligner):
    mixer, x, visual = build(aligner=aligner)
    y, expected = mixer(x, visual=visual), literal(mixer, x, visual)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    grads = torch.autograd.grad((y * weight).sum(), leaves)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, want)


def test_positions_of_each_row():
    mixer, x, visual = build()
    positions = torch.tensor([[0, 2, 3, 9, 10, 12, 13]]).expand(2, -1)
    expected = literal(mixer, x, visual, positions[0].tolist())
    torch.testing.assert_close(mixer(x, visual=visual, positions=positions), expected)
    torch.testing.assert_close(mixer(x, visual=visual, positions=positions[0]), expected)


def test_images_in_front_are_the_pattern():
    mixer, x, _ = build()
    visual = (torch.arange(N) < 3).expand(2, N)
    u = mixer.attention_norm(x)
    split = [t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (mixer.query(u), mixer.key(u), mixer.value(u))]
    angles = torch.arange(N, dtype=torch.float64)[:, None]
    query, key = (heedful.ops.rotary.rotate(t, angles) for t in split[:2])
    heads = heedful.attention(query, key, split[2], pattern=p.Composite(3))
    h = x + mixer.out(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, visual=visual), h + mixer.ffn(mixer.ffn_norm(h)))


def test_all_text_is_the_plain_layer_and_all_images_need_no_query():
    mixer, x, visual = build()
    torch.testing.assert_close(mixer(x, visual=torch.zeros_like(visual)), mixer(x))
    y = mixer(x, visual=torch.ones_like(visual))
    u = mixer.attention_norm(x)
    own = mixer.value(u).unflatten(-1, (2, 1, 2)).expand(-1, -1, -1, 3, -1).flatten(2)
    h = x + mixer.out(own)
    torch.testing.assert_close(y, h + mixer.ffn(mixer.ffn_norm(h)))
    y.sum().backward()
    assert not mixer.query.weight.grad.any()


def test_order_of_visual_tokens_does_not_matter_to_them():
    mixer, x, _ = build()
    visual = (torch.arange(N) < 4).expand(2, N)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6])
    moved = mixer(x[:, order], visual=visual)
    torch.testing.assert_close(moved[:, :4], mixer(x, visual=visual)[:, order[:4]])


def test_many_groups_of_text_and_queries_of_text_alone():
    mixer, _, _ = build()
    x = torch.randn(2, 400, 12, dtype=torch.float64)
    visual = torch.rand(2, 400) < 0.3
    asked = []
    mixer.query.register_forward_hook(lambda module, inputs, output: asked.append(output.shape[1]))
    y = mixer(x, visual=visual)
    assert asked == [int((~visual).sum(1).max())]
    plain = mixer(x)  # the last row of text does not know whether others are visual
    first = int(visual[0].long().argmax())
    torch.testing.assert_close(y[0, :first], plain[0, :first])
    dense = torch.stack([mixer(x[:1, : t + 1], visual=visual[:1, : t + 1])[0, t] for t in (129, 257, 399)])
    torch.testing.assert_close(y[0, [129, 257, 399]], dense)


@pytest.mark.parametrize(("visual", "n"), [(0, 9), (4, 9), (9, 9), (12, 9), (7, 23)])
def test_pattern(visual, n):
    pattern = p.Composite(visual)
    wanted = torch.tensor([[k == q or (k < q and q >= visual) for k in range(n)] for q in range(n)])
    assert torch.equal(pattern.mask(n)[0, 0], wanted)
    assert torch.equal(pattern.mask(3, n)[0, 0], wanted[-3:])
    v, t = min(visual, n), max(n - visual, 0)
    assert round(pattern.density(n) * n * n) == v + t * v + t * (t + 1) // 2
    for size in ((1, 1), (2, 3), (4, 2)):
        for rows, offset in ((n, 0), (3, n - 3)):
            shape = (-(-rows // size[0]), -(-n // size[1]))
            table = pattern.block_table(rows, n, block_size=size)
            kinds = torch.zeros(shape, dtype=torch.bool)
            for i in range(shape[0]):
                kinds[i, table.index[0, 0, i, : int(table.count[0, 0, i])].long()] = True
            for i in range(shape[0]):
                for j in range(shape[1]):
                    first = offset + i * size[0]
                    last = min(first + size[0], offset + rows)
                    assert kinds[i, j] == wanted[first:last, j * size[1] : (j + 1) * size[1]].any()


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_pattern_in_other_backends(backend):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 300, 8, dtype=torch.float64)
    pattern = p.Composite(170)
    expected = heedful.attention(query, key, value, pattern=pattern, backend="reference")
    torch.testing.assert_close(
        heedful.attention(query, key, value, pattern=pattern, backend=backend), expected
    )


def test_a_pretrained_layer_under_the_pattern_is_this_layer():
    """The training-free form: the pattern inside a model of transformers, and its weights in this layer."""
    transformers = pytest.importorskip("transformers")
    import heedful.hf

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    model = transformers.LlamaModel(config).double().eval()
    model.set_attn_implementation("heedful")
    x = torch.randn(2, N, 12, dtype=torch.float64)
    with torch.no_grad(), heedful.hf.use_pattern(p.Composite(4)):
        expected = model(inputs_embeds=x).last_hidden_state
    names = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "out",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    y = x
    for layer in model.layers:
        weights = layer.state_dict()
        ours = CompositeAttentionLayer(12, heads=6, kv_heads=2, hidden=10, rotary_base=50.0).double()
        ours.load_state_dict({f"{b}.weight": weights[f"{a}.weight"] for a, b in names.items()}, strict=True)
        y = ours(y, visual=(torch.arange(N) < 4).expand(2, N))
    # transformers turns queries and keys in float32
    torch.testing.assert_close(model.norm(y), expected, rtol=1e-5, atol=1e-6)


def test_parameters_are_those_of_the_plain_layer():
    layer = CompositeAttentionLayer(64, heads=8, kv_heads=2, hidden=80, device="meta")
    assert sum(q.numel() for q in layer.parameters()) == 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 80 + 2 * 64


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="aligner is 'ffn'"):
        CompositeAttentionLayer(16, heads=4, aligner="ffn")
    with pytest.raises(ValueError, match="even number of channels a head"):
        CompositeAttentionLayer(12, heads=4)
    with pytest.raises(ValueError, match="num_visual is -1"):
        p.Composite(-1)
    with pytest.raises(ValueError, match=r"visual has shape \(2, 5\)"):
        CompositeAttentionLayer(16, heads=4)(
            torch.zeros(2, 4, 16), visual=torch.zeros(2, 5, dtype=torch.bool)
        )
