"""Motif's feed-forward net: its formula, its gradients, large and small inputs, its place in the models."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.grouped_differential_attention import GroupedDifferentialAttention
from heedful.mixers.heads.polynorm import PolyNorm, PolyNormGLU
from heedful.models.block import Block
from heedful.models.decoder_lm import DecoderLM
from heedful.models.encoder import Encoder


def literal(act, row):
    """The formula, channel by channel."""
    (w0, w1, w2), b = act.weight, act.bias[0]

    def n(z):
        return z / (sum(v * v for v in z) / len(z) + act.eps) ** 0.5

    return w0 * n(row * row * row) + w1 * n(row * row) + w2 * n(row) + b


def shaken(seed=0):
    torch.manual_seed(seed)
    act = PolyNorm(dtype=torch.float64)
    torch.nn.init.normal_(act.weight)
    torch.nn.init.normal_(act.bias)
    return act


# Around 1 the division by the largest channel begins; at 1e-3 eps is most of the mean.
@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 40.0])
def test_is_its_formula(size):
    act = shaken()
    x = (size * torch.randn(2, 3, 7, dtype=torch.float64)).requires_grad_()
    y = act(x)
    expected = torch.stack([literal(act, row) for row in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight, leaves = torch.randn_like(y), [x, act.weight, act.bias]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("size", [0.3, 5.0])
def test_gradients(size):
    net = PolyNormGLU(3, hidden=5, dtype=torch.float64)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x = (size * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    leaves = dict(net.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(net, dict(zip(leaves, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *leaves.values()))
    assert torch.autograd.gradgradcheck(run, (x, *leaves.values()))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e3),
        (torch.bfloat16, 1e5),
        (torch.bfloat16, 1e37),
        (torch.float32, 1e37),
        (torch.float16, 0),
    ],
)
def test_large_inputs_do_not_overflow(dtype, size):
    act = shaken()
    torch.manual_seed(1)
    x = (size * torch.randn(4, 9, dtype=torch.float64)).to(dtype).requires_grad_()
    act32 = PolyNorm(dtype=torch.float32)
    act32.load_state_dict(act.state_dict())
    y = act32.to(dtype)(x)
    act.load_state_dict(act32.state_dict())  # with the weights as the dtype holds them
    expected = torch.stack([literal(act, row) for row in x.detach().double() / max(size, 1)])
    # eps counts for nothing at these sizes; the output is rounded once
    few = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=few, atol=1e-5 * 4)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert grad.isfinite().all()


def test_the_scale_of_large_inputs_does_not_matter():
    act = shaken()
    x = torch.randn(4, 9, dtype=torch.float64)
    # eps beside a mean of squares that is above 1e6
    torch.testing.assert_close(act(1e4 * x), act(1e7 * x), rtol=1e-9, atol=1e-9)
    assert (act(x * 0) == act.bias).all()


def test_the_net_is_its_formula():
    torch.manual_seed(0)
    net = PolyNormGLU(4, hidden=6, dtype=torch.float64)
    torch.testing.assert_close(net.act.weight, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert net.act.bias.tolist() == [0.0]
    torch.nn.init.normal_(net.act.weight)
    x = torch.randn(5, 4, dtype=torch.float64)
    for row, y in zip(x, net(x), strict=True):
        inner = literal(net.act, net.gate.weight @ row) * (net.up.weight @ row)
        torch.testing.assert_close(y, net.down.weight @ inner)
    assert sum(p.numel() for p in net.parameters()) == 3 * 4 * 6 + 4


def test_no_row_knows_another():
    net = PolyNormGLU(4, hidden=6, dtype=torch.float64)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x)[:, :3], net(x[:, :3]))
    assert net(x[:, :0]).shape == (2, 0, 4)


def test_autocast_and_half():
    net = PolyNormGLU(16, hidden=48)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(100 * x)
    assert y.dtype == torch.bfloat16
    # three products and the activation rounded to 8 bits
    torch.testing.assert_close(
        y.float(), net(100 * x), rtol=0.05, atol=0.05 * float(net(100 * x).detach().abs().max())
    )
    assert net.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("made", [DecoderLM, Encoder])
def test_in_the_models(made, tmp_path):
    torch.manual_seed(0)
    model = made(11, 16, depth=2, heads=4, mlp="polynorm")
    assert [type(layer.mlp) for layer in model.layers] == 2 * [PolyNormGLU]
    assert model.layers[0].mlp.gate.out_features == 48  # 8/3 * 16 rounded up to 8, as for SwiGLU
    assert made(11, 16, depth=1, heads=4, mlp="polynorm", hidden=10).layers[0].mlp.gate.out_features == 10
    with torch.no_grad():
        model.layers[0].mlp.act.weight.normal_()
    ids = torch.randint(11, (2, 6))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.layers[0].mlp.parameters())
    model.save(tmp_path)
    torch.testing.assert_close(made.load(tmp_path)(ids).logits, model(ids).logits)


def test_motif_block_decodes():
    """Grouped differential attention with its feed-forward net, as in Motif."""
    torch.manual_seed(0)
    mixers = ("grouped-differential-attention", {"heads": 4, "noise_heads": 1, "kv_heads": 2, "head_dim": 4})
    model = DecoderLM(11, 16, depth=2, mixers=mixers, mlp="polynorm", dtype=torch.float64).eval()
    assert isinstance(model.mixers[0], GroupedDifferentialAttention)
    ids = torch.randint(11, (2, 5))
    made = model.generate(ids, 4)
    for n in range(5, 9):
        assert torch.equal(model(made[:, :n]).logits[:, -1].argmax(-1), made[:, n])


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="hidden is 0, must be a whole number"):
        PolyNormGLU(4, hidden=0)
    with pytest.raises(ValueError, match="dim is 0, must be a whole number"):
        PolyNormGLU(0, hidden=4)
    with pytest.raises(ValueError, match="mlp is 'poly', must be one of 'swiglu', 'gelu', 'polynorm'"):
        Block(GroupedDifferentialAttention(16, heads=4, head_dim=4), mlp="poly")
