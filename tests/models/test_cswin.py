"""CSwin's frame around any attention: Agent-CSwin and InLine-CSwin."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.models.agent_cswin import AgentCSwin
from heedful.models.cswin import LePEAttention, crossing
from heedful.models.inline_cswin import InLineCSwin
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def stripe_attention(q, k, v, core):
    """Of maps (c, height, width): each head, and the convolution inside the stripe."""
    size, d = q.shape[1:], q.shape[0] // core.heads
    q, k, v = (t.flatten(1).T for t in (q, k, v))
    heads = []
    for h in range(core.heads):
        own = slice(h * d, (h + 1) * d)
        heads.append((q[:, own] @ k[:, own].T / d**0.5).softmax(-1) @ v[:, own])
    y = torch.cat(heads, -1).T.unflatten(1, size)
    return (
        y
        + F.conv2d(v.T.unflatten(1, size)[None], core.dwc.weight, core.dwc.bias, padding=1, groups=len(y))[0]
    )


def test_stripes_equal_transcription():
    torch.manual_seed(0)
    attend = crossing(8, heads=4, stripe=2, side=6).double()
    qkv = torch.randn(
        3, 2, 8, 5, 7, dtype=torch.float64, requires_grad=True
    )  # beside whole stripes a narrow one
    expected = torch.zeros(2, 8, 5, 7, dtype=torch.float64)
    for b in range(2):
        for a in range(0, 7, 2):
            part = qkv[:, b, :4, :, a : a + 2]
            expected[b, :4, :, a : a + 2] = stripe_attention(*part, attend.cores[0])
        for a in range(0, 5, 2):
            part = qkv[:, b, 4:, a : a + 2]
            expected[b, 4:, a : a + 2] = stripe_attention(*part, attend.cores[1])
    y = attend(qkv, qkv[0])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [qkv, *attend.parameters()]
    given = torch.autograd.grad((y * weight).sum(), leaves)
    torch.testing.assert_close(given, torch.autograd.grad((expected * weight).sum(), leaves))


def test_a_map_of_one_stripe_has_one_core():
    (core,) = crossing(8, heads=1, stripe=4, side=4).cores
    assert core.heads == 1
    assert len(crossing(8, heads=2, stripe=3, side=4).cores) == 2
    with pytest.raises(ValueError, match="heads is 3, must be even"):
        crossing(12, heads=3, stripe=3, side=4)


@pytest.mark.parametrize("kind", [AgentCSwin, InLineCSwin])
def test_equals_transcription(kind):
    model = make(kind)
    given = x = image(model)
    for stage, (part, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        how = {"stride": 2, "padding": 1} if stage else {"stride": 4, "padding": 2}
        x = F.conv2d(x, part.conv.weight, part.conv.bias, **how)
        x = norm(x.movedim(1, -1), part.norm).movedim(-1, 1)
        for block in blocks:
            projected = block.qkv(norm(x.movedim(1, -1), block.norm1)).movedim(-1, 1)
            qkv = torch.stack(projected.chunk(3, 1))
            if hasattr(block.attend, "core"):  # the mean is of x before the norm
                y = block.attend.core(*qkv, x.flatten(2).sum(2) / x[0, 0].numel())
            elif isinstance(block.attend.cores[0], LePEAttention):
                y = block.attend(qkv, x)
            else:
                size = tuple(x.shape[2:])
                y = block.attend.cores[0](*qkv.flatten(3).mT, size=size).mT.unflatten(2, size)
            x = x + block.proj(y.movedim(1, -1)).movedim(-1, 1)
            hidden = F.gelu(block.mlp.fc1(norm(x.movedim(1, -1), block.norm2)))
            x = x + block.mlp.fc2(hidden).movedim(-1, 1)
        torch.testing.assert_close(model.features(given)[stage], x)
    torch.testing.assert_close(model(given), model.head(norm(x.movedim(1, -1), model.norm).mean((1, 2))))


def test_which_attention_stands_where():
    model = AgentCSwin(**AgentCSwin.example)
    cores = [[len(block.attend.cores) for block in stage] for stage in model.stages]
    assert cores == [[1], [1, 2], [2], [1]]  # agents and the last stage have the whole map
    assert model.stages[1][1].attend.stripe == 2


def test_images_are_padded():
    model = make(AgentCSwin)
    x = image(model, size=(30, 69))
    assert [tuple(y.shape[2:]) for y in model.features(x)] == [(8, 18), (4, 9), (2, 5), (1, 3)]
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))


@pytest.mark.parametrize("kind", [AgentCSwin, InLineCSwin])
def test_the_authors_names(kind):
    model = make(kind)
    theirs = {}
    for name, value in model.state_dict().items():
        name = name.replace("downsample.0.conv.", "stage1_conv_embed.0.")
        name = name.replace("downsample.0.norm.", "stage1_conv_embed.2.")
        name = name.replace("downsample.", "merge")
        name = re.sub(r"^stages\.(\d)\.", lambda m: f"stage{int(m[1]) + 1}.", name)
        name = name.replace(".attend.cores.", ".attns.").replace(".attend.core.", ".attns.0.")
        theirs[name.replace(".dwc.", ".get_v.").replace(".lepe.", ".get_v.")] = value
    assert {
        "merge3.conv.weight",
        "stage1.0.attns.0.get_v.bias",
        "stage2.1.attns.1.get_v.weight",
    } <= theirs.keys()
    other = authors.load(kind(**{**kind.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))
