"""The pyramid of PVT around any mixer: Agent-PVT and InLine-PVT."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful import authors
from heedful.models.agent_pvt import AgentPVT
from heedful.models.inline_pvt import InLinePVT
from heedful.testing.check_backbone import image, make


def norm(x, layer, eps):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("kind", [AgentPVT, InLinePVT])
def test_equals_transcription(kind):
    model = make(kind)
    given = x = image(model)
    for stage, (part, (block,)) in enumerate(zip(model.downsample, model.stages, strict=True)):
        x = norm(F.conv2d(x, part.proj.weight, part.proj.bias, stride=2 if stage else 4), part.norm, 1e-5)
        x = x + model.positions[stage].mT.view(1, -1, *x.shape[2:])
        x = x + block.mixer(norm(x, block.norm1, 1e-6))
        h = torch.einsum("dc,bcyx->bdyx", block.mlp.fc1.weight, norm(x, block.norm2, 1e-6))
        h = F.gelu(h + block.mlp.fc1.bias[:, None, None])
        h = torch.einsum("dc,bcyx->bdyx", block.mlp.fc2.weight, h)
        x = x + h + block.mlp.fc2.bias[:, None, None]
        torch.testing.assert_close(model.features(given)[stage], x)
    torch.testing.assert_close(model(given), model.head(x.mean((2, 3))))


def test_images_are_padded_and_positions_interpolated():
    model = make(InLinePVT)
    x = image(model, size=(30, 69))
    assert [tuple(y.shape[2:]) for y in model.features(x)] == [(8, 18), (4, 9), (2, 5), (1, 3)]
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))
    with torch.no_grad():  # the same position everywhere is that also on a map of another size
        for table in model.positions:
            table.copy_(table[:, :1].expand_as(table))
        y = model(x)
        model.sides = [1] * 4
        model.positions = nn.ParameterList(table[:, :1].clone() for table in model.positions)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("kind", [AgentPVT, InLinePVT])
def test_the_authors_names(kind):
    model = make(kind)
    theirs = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^downsample\.(\d)\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
        name = re.sub(r"^positions\.(\d)", lambda m: f"pos_embed{int(m[1]) + 1}", name)
        name = re.sub(r"^stages\.(\d)\.", lambda m: f"block{int(m[1]) + 1}.", name)
        name = name.replace(".mixer.", ".attn.").replace(".core.", ".")
        if ".attn.qkv." in name:
            dim = len(value) // 3
            theirs[name.replace("qkv", "q")], theirs[name.replace("qkv", "kv")] = value[:dim], value[dim:]
        else:
            theirs[name] = value
    assert {"block1.0.attn.q.weight", "block4.0.attn.kv.bias", "pos_embed4"} <= theirs.keys()
    other = authors.load(kind(**{**kind.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))
