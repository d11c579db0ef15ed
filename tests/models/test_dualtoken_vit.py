"""DualToken-ViT: its attention step by step, and the frame around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.grid.dualtoken_vit import DualTokenAttention
from heedful.models.dualtoken_vit import BiDimensionalGates, DualTokenViT, Merge
from heedful.testing.check_backbone import image, make


def build(**options):
    torch.manual_seed(0)
    mixer = DualTokenAttention(
        6, **{"heads": 2, "side": 2, "downsamples": 1, "kernel": 3, **options}, dtype=torch.float64
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for stage in mixer.shrink:
        stage[1].running_mean.normal_()
        stage[1].running_var.uniform_(0.5, 1.5)
    return mixer.eval()


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def mlp(x, layers):
    x = linear(x, layers[0])
    return linear(x * (1 + torch.erf(x / 2**0.5)) / 2, layers[2])


def attend(q, k, v):
    """(n, 6) and (m, 6): two heads of three channels."""
    heads = []
    for own in (slice(0, 3), slice(3, 6)):
        weight = (q[:, own] @ k[:, own].T / 3**0.5).exp()
        heads.append(weight @ v[:, own] / weight.sum(-1, keepdim=True))
    return torch.cat(heads, -1)


def literal(m, x, g):
    """One image (c, height, width) and its tokens (s, c)."""
    height, width = x.shape[1:]
    local = F.conv2d(x[None], m.conv.weight, m.conv.bias, padding=1, groups=6)[0]
    local = x.movedim(0, -1) + mlp(norm(local.movedim(0, -1), m.conv_norm), m.conv_mlp)
    small = local.movedim(-1, 0)
    for conv, batch_norm, _, _ in m.shrink:
        small = F.conv2d(small[None], conv.weight, padding=1, groups=6)[0].movedim(0, -1)
        small = (small - batch_norm.running_mean) / (batch_norm.running_var + 1e-5).sqrt()
        small = small * batch_norm.weight + batch_norm.bias
        small = (small * (1 + torch.erf(small / 2**0.5)) / 2).movedim(-1, 0)
        small = small.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    cells = small.unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4)).flatten(1).T
    q, k, v = linear(norm(cells, m.gather_norm), m.gather).split(6, -1)
    gathered = linear(attend(q, k, v), m.gather_out)
    share = 1 / (1 + (-m.alpha).exp())
    g = share * g + (1 - share) * gathered
    if m.mix_norm is not None:
        g = g + mlp(norm(g, m.mix_norm).T, m.mix_mlp).T
    g = g + mlp(norm(g, m.token_norm), m.token_mlp)
    q = linear(norm(local, m.query_norm).flatten(0, 1), m.query)
    k, v = linear(norm(g, m.key_norm), m.key_value).split(6, -1)
    given = linear(attend(q, k, v), m.give_out).view(height, width, 6)
    y = x.movedim(0, -1) + linear(torch.cat([local, given], -1), m.fuse)
    return y.movedim(-1, 0), g


@pytest.mark.parametrize("options", [{}, {"mixing": False, "downsamples": 0}])
def test_equals_transcription_with_gradients(options):
    mixer = build(**options)
    x = torch.randn(2, 6, 4, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    ours = mixer.step(x, g)
    wanted = tuple(torch.stack(part) for part in zip(*map(literal, [mixer] * 2, x, g), strict=True))
    torch.testing.assert_close(ours, wanted)
    leaves, ups = (x, g, *mixer.parameters()), [torch.randn_like(part) for part in ours]
    torch.testing.assert_close(*(torch.autograd.grad(part, leaves, ups) for part in (ours, wanted)))
    torch.testing.assert_close(mixer(x), mixer.step(x, torch.zeros_like(g))[0])


def test_places_read_from_the_tokens_alone():
    mixer = build()
    local, tokens = torch.randn(1, 6, 4, 4, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    given = mixer.given(local, tokens)
    other = local.clone()
    other[..., 0, 0] += 1
    torch.testing.assert_close(mixer.given(other, tokens)[:, 1:], given[:, 1:])


def test_gates_equal_transcription():
    torch.manual_seed(0)
    gates = BiDimensionalGates(8).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    z = norm(x, gates.norm)
    whole = F.gelu(linear(z.flatten(1, 2).mean(1), gates.whole))
    channel = 1 / (1 + (-linear(whole, gates.channel_gate)).exp())
    place = F.gelu(linear(z, gates.place))
    place = torch.cat([place, whole[:, None, None].expand(2, 3, 4, 2)], -1)
    place = 1 / (1 + (-linear(place, gates.place_gate)).exp())
    torch.testing.assert_close(gates(x), x * channel[:, None, None] * place)


def test_merging_equals_transcription():
    torch.manual_seed(0)
    merge = Merge(3, 5).double()
    x, g = torch.randn(1, 3, 3, 4, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    y, tokens = merge(x, g)
    assert y.shape == (1, 5, 2, 2)
    padded = F.pad(x, (0, 0, 0, 1))
    for i in range(2):
        for j in range(2):
            square = padded[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
            largest = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((1, 2))
            wanted = merge.proj.weight @ norm(square, merge.norm) + linear(largest, merge.pooled)
            torch.testing.assert_close(y[0, :, i, j], wanted)
    torch.testing.assert_close(tokens, linear(norm(g, merge.token_norm), merge.token_proj))


def test_tokens_run_through_the_network():
    model = make(DualTokenViT)
    x = image(model)
    y, g, maps = model.stem(x), model.tokens.repeat(2, 1, 1), []
    assert y.shape == (2, 8, 8, 8)
    for stage, blocks in enumerate(model.stages):
        if stage:
            y, g = model.merges[stage - 1](y, g)
        for block in blocks:
            y, g = block.mixer.step(y, g)
            y = y + block.gates(block.mlp(block.norm(y.movedim(1, -1)))).movedim(-1, 1)
        maps.append(y)
        assert g.shape == (2, 4, y.shape[1])
    torch.testing.assert_close(model.features(x), maps)
    torch.testing.assert_close(model(x), model.head(norm(y.mean((2, 3)), model.norm)))
    assert [len(stage[0].mixer.shrink) for stage in model.stages] == [2, 1, 0]


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 4, must divide dim"):
        DualTokenAttention(6, heads=4)
    with pytest.raises(ValueError, match="kernel is 4, must be odd"):
        DualTokenAttention(6, kernel=4)
    with pytest.raises(ValueError, match=r"heads is \(1, 2\), must have 3 entries, one for each stage"):
        DualTokenViT(heads=(1, 2))
