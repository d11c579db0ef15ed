"""BEVANet as a whole: its parts, what joins what, counts, any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import models
from heedful.models.bevanet import BasicBlock, BEVANet, Bottleneck
from heedful.models.bevanet_parts import (
    BoundaryGuidedFusion,
    EVABlock,
    PixelAttentionFusion,
    PyramidPooling,
)


def random(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.add_(0.3 * (torch.rand_like(t) if "var" in name else torch.randn_like(t)))
    return module.double().eval()


def maps(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def pre(x, part, dilation=1):
    """BN, ReLU, convolution."""
    x = part[0](x).clamp(min=0)
    return F.conv2d(x, part[2].weight, padding=part[2].weight.shape[-1] // 2 * dilation, dilation=dilation)


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_pyramid_pooling():
    m, x = random(PyramidPooling(6, 4, 5)), maps(2, 6, 9, 7)
    size = (9, 7)
    s0 = pre(x, m.scales[0])
    s1 = up(pre(F.avg_pool2d(x, 5, stride=2, padding=2), m.scales[1]), size)
    s2 = up(pre(F.avg_pool2d(x, 9, stride=4, padding=4), m.scales[2]), size)
    s3 = up(pre(F.adaptive_avg_pool2d(x, 2), m.scales[3]), size)
    s4 = pre(x.mean((2, 3), keepdim=True), m.scales[4]).expand(-1, -1, *size)
    wide = m.norm(s0)
    gated = m.attention.gate(F.gelu(m.attention.proj_in(wide)))
    wide = s0 + m.attention_scale.gamma[:, None, None] * (wide + m.attention.proj_out(gated))
    z = [s0]
    for other, part, dilation in zip([s1, s2, wide, s3, s4], m.process, (2, 2, 1, 1, 1), strict=True):
        z.append(pre(other + z[-1], part, dilation))
    torch.testing.assert_close(m(x), pre(torch.cat(z, 1), m.join) + pre(x, m.shortcut))


def test_fusions():
    m, x, y = random(PixelAttentionFusion(4, 3)), maps(2, 4, 6, 5), maps(2, 4, 3, 3).flip(0)
    alike = (m.of_x(x) * up(m.of_y(y), (6, 5))).sum(1, keepdim=True)
    s = 1 / (1 + (-alike).exp())
    torch.testing.assert_close(m(x, y), x * (1 - s) + s * up(y, (6, 5)))
    m, d = random(BoundaryGuidedFusion(4, 3)), maps(2, 4, 6, 5).flip(2)
    p, i, e = pre(x, m.detail), pre(y := maps(2, 4, 6, 5).flip(3), m.semantic), 1 / (1 + (-d).exp())
    torch.testing.assert_close(m(x, y, d), pre(e * p + (1 - e) * i + p + i, m.join))


def test_block():
    m, x = random(EVABlock(4, kernel=11, mlp_ratio=2.0)), maps(2, 4, 6, 5)
    a = m.norm1(x)
    a = a + m.mixer.proj_out(m.mixer.gate(F.gelu(m.mixer.proj_in(a))))
    y = x + m.scale1.gamma[:, None, None] * a
    z = m.mlp.fc2(F.gelu(m.mlp.dwconv(m.mlp.fc1(m.norm2(y)))))
    torch.testing.assert_close(m(x), y + m.scale2.gamma[:, None, None] * z)
    assert bool((EVABlock(4, kernel=7).scale1.gamma == 0.01).all())


def test_what_joins_what():
    model, x = random(BEVANet(**BEVANet.example)), maps(2, 3, 64, 96)
    eighth = model.stem(x)
    assert eighth.shape == (2, 16, 8, 12)
    semantic = model.semantic3(eighth)
    first = model.fuse3(model.detail3(eighth), model.compress3(semantic))
    semantic = model.semantic4(semantic)
    second = model.fuse4(model.detail4(first.clamp(min=0)), model.compress4(semantic))
    pooled = up(model.pooling(model.semantic5(semantic)), (8, 12))
    y = model.head(model.fusion(model.detail5(second), pooled, model.boundary5(second)))
    torch.testing.assert_close(model(x), y)
    assert [type(part).__name__ for part in model.semantic4] == [
        "BasicBlock",
        *["EVABlock", "LayerNorm2d"] * 2,
    ]


def test_relu_behind_blocks():
    model = BEVANet(**{**BEVANet.example, "depths": (3, 1, 2)})
    assert [block.act for block in model.stem[6]] == [True, True, False]
    assert [block.act for block in model.stem[8]] == [True]
    block, x = random(BasicBlock(4, 6, stride=2)), maps(2, 4, 5, 6)
    y = block.shortcut(x) + block.second(block.first(x).clamp(min=0))
    torch.testing.assert_close(block(x), y.clamp(min=0))
    block = random(Bottleneck(4, 3))
    y = block.second(block.first(x).clamp(min=0)).clamp(min=0)
    torch.testing.assert_close(block(x), block.shortcut(x) + block.third(y))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bevanet", 58_599_296),
        ("bevanet_s", 15_090_784),
        ("bevanet_s_camvid", 15_089_752),
        ("bevanet_l", 59_828_992),
        ("bevanet_ade", 58_616_195),
    ],
)
def test_published_parameters_without_the_heads_of_training(name, count):
    with torch.device("meta"):
        model = models.create(name, auxiliary=False)
    assert models.parameters(model) == count


def test_published_flops():
    """20.1 G at CamVid's 720 x 960, within 2 %."""
    with torch.device("meta"):
        model = models.create("bevanet_s_camvid", auxiliary=False)
        counted = models.multiply_adds(model, torch.zeros(1, 3, 720, 960))
    assert abs(counted - 20.1e9) < 0.02 * 20.1e9


@pytest.mark.parametrize("size", [(1, 1), (33, 51), (130, 64)])
def test_any_size(size):
    model = random(BEVANet(**BEVANet.example))
    y = model(maps(2, 3, *size))
    assert y.shape == (2, 5, -(-size[0] // 8), -(-size[1] // 8)) and y.isfinite().all()
    torch.testing.assert_close(y[1:], model(maps(2, 3, *size)[1:]), rtol=1e-8, atol=1e-8)


def test_training_gives_three_and_reaches_every_parameter():
    model = random(BEVANet(**BEVANet.example)).train()
    outputs = model(**model.example_inputs(dtype=torch.float64))
    assert [tuple(y.shape) for y in outputs] == [(2, 5, 8, 12), (2, 5, 8, 12), (2, 1, 8, 12)]
    sum(y.square().mean() for y in outputs).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    alone = BEVANet(**BEVANet.example, auxiliary=False).train()
    assert isinstance(alone(**alone.example_inputs()), torch.Tensor)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"depths is \(2, 2\), must have 3 entries, one for each stage"):
        BEVANet(depths=(2, 2))
    with pytest.raises(ValueError, match="x has shape"):
        BEVANet(**BEVANet.example)(torch.zeros(1, 4, 64, 64))
