"""Swin's frame around any mixer: Agent-Swin and InLine-Swin."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.mixers.grid.agent_attention import AgentAttention
from heedful.models.agent_swin import AgentSwin
from heedful.models.inline_swin import InLineSwin
from heedful.models.swin import ShiftedWindowAttention
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def cells(side, window, shift):
    """The rows of each window, of a grid that starts at `shift`."""
    cuts = [0, *range(shift or window, side, window), side]
    return [range(a, b) for a, b in pairwise(cuts)]


def windows(x, mixer, shift):
    """Attention of a map (c, height, width), window by window and head by head."""
    c, height, width = x.shape
    w, d = mixer.window, c // mixer.heads
    y = torch.zeros(height, width, c, dtype=x.dtype)
    for rows in cells(height, w, shift):
        for columns in cells(width, w, shift):
            places = [(i, j) for i in rows for j in columns]
            tokens = torch.stack([x[:, i, j] for i, j in places])
            q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).split(c, -1)
            offsets = [[(2 * w - 1) * (a - i + w - 1) + b - j + w - 1 for i, j in places] for a, b in places]
            heads = []
            for h in range(mixer.heads):
                own = slice(h * d, (h + 1) * d)
                bias = mixer.relative_bias[:, h][torch.tensor(offsets)]
                heads.append((q[:, own] @ k[:, own].T / d**0.5 + bias).softmax(-1) @ v[:, own])
            out = torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias
            for (i, j), token in zip(places, out, strict=True):
                y[i, j] = token
    return y.permute(2, 0, 1)


# A map of whole windows, two that are padded, one that is no wider than a window and so is not shifted.
@pytest.mark.parametrize("size", [(8, 12), (5, 11), (4, 9)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_equals_transcription(size, shifted):
    torch.manual_seed(0)
    mixer = ShiftedWindowAttention(6, heads=2, window=4, shifted=shifted).double()
    torch.nn.init.normal_(mixer.relative_bias)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    shift = 2 if shifted and min(size) > 4 else 0
    y, expected = mixer(x), torch.stack([windows(row, mixer, shift) for row in x])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    given = torch.autograd.grad((y * weight).sum(), leaves)
    torch.testing.assert_close(given, torch.autograd.grad((expected * weight).sum(), leaves))


@pytest.mark.parametrize("kind", [AgentSwin, InLineSwin])
def test_equals_transcription(kind):
    model = make(kind)
    given = x = image(model)
    stem = model.downsample[0]
    x = F.conv2d(x, stem.proj.weight, stem.proj.bias, stride=4)
    x = norm(x.movedim(1, -1), stem.norm).movedim(-1, 1)
    for stage, blocks in enumerate(model.stages):
        if stage:
            merge = model.downsample[stage]
            corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = (norm(torch.cat(corners, 1).movedim(1, -1), merge.norm) @ merge.reduction.weight.T).movedim(
                -1, 1
            )
        for block in blocks:
            x = x + block.mixer(norm(x.movedim(1, -1), block.norm1).movedim(-1, 1))
            hidden = F.gelu(block.mlp.fc1(norm(x.movedim(1, -1), block.norm2)))
            x = x + block.mlp.fc2(hidden).movedim(-1, 1)
        torch.testing.assert_close(model.features(given)[stage], x)
    torch.testing.assert_close(model(given), model.head(norm(x.movedim(1, -1), model.norm).mean((1, 2))))


def test_windows_alone_are_timms_swin():
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    shape = {"depths": (1, 2, 3, 1)}
    theirs = SwinTransformer(96, window_size=3, embed_dim=8, num_heads=(1, 1, 2, 2), num_classes=5, **shape)
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    how = {"dims": (8, 16, 32, 64), "heads": (1, 1, 2, 2), "agent_layers": (0,) * 4, "window": 3}
    ours = AgentSwin(classes=5, image_size=96, **how, **shape).double().eval()
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("head.fc.", "head.")
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name] = value
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    torch.testing.assert_close(authors.load(ours, state)(x), theirs(x))


def test_which_attention_stands_where():
    model = AgentSwin(**AgentSwin.example)
    first, second, third = (block.mixer for block in model.stages[2])
    assert isinstance(first, AgentAttention)
    assert second.shifted and not third.shifted
    assert [type(b.mixer) for b in model.stages[3]] == [ShiftedWindowAttention]
    assert model.stages[3][0].mixer.window == 2  # no more than the map


def test_images_are_padded():
    model = make(AgentSwin)
    x = image(model, size=(30, 69))
    assert [tuple(y.shape[2:]) for y in model.features(x)] == [(8, 18), (4, 9), (2, 5), (1, 3)]
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))


@pytest.mark.parametrize("kind", [AgentSwin, InLineSwin])
def test_the_authors_names(kind):
    model = make(kind)
    theirs = {"layers.2.blocks.1.attn_mask": torch.zeros(4, 9, 9)}
    for name, value in model.state_dict().items():
        name = re.sub(r"^downsample\.0\.", "patch_embed.", name)
        name = re.sub(r"^downsample\.(\d)\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
        name = re.sub(r"^stages\.(\d)\.", r"layers.\1.blocks.", name)
        name = name.replace(".mixer.", ".attn.").replace(".core.", ".")
        theirs[name.replace(".relative_bias", ".relative_position_bias_table")] = value
        if name.endswith(".relative_bias"):
            theirs[name.replace(".relative_bias", ".relative_position_index")] = torch.zeros(9, 9)
    assert {"patch_embed.norm.weight", "layers.2.downsample.reduction.weight"} <= theirs.keys()
    assert "layers.3.blocks.0.attn.relative_position_bias_table" in theirs
    other = authors.load(kind(**{**kind.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))
