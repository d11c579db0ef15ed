"""DeiT's frame around any mixer: InLine-DeiT and Agent-DeiT."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from heedful import authors
from heedful.mixers.grid.agent_attention import AgentAttentionDeiT
from heedful.models.agent_deit import AgentDeiT
from heedful.models.deit import DenseAttention
from heedful.models.inline_deit import InLineDeiT
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def test_equals_transcription():
    for kind in (InLineDeiT, AgentDeiT):
        model = make(kind)
        x = image(model, size=(48, 48))
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16).movedim(1, 3).flatten(3).flatten(1, 2)
        tokens = patches @ model.embed.weight.flatten(1).T + model.embed.bias
        tokens = torch.cat([model.class_token.expand(2, 1, -1), tokens], 1) + model.positions
        for block in model.blocks:
            tokens = tokens + block.mixer(norm(tokens, block.norm1), size=(3, 3))
            hidden = F.gelu(block.mlp.fc1(norm(tokens, block.norm2)))
            tokens = tokens + block.mlp.fc2(hidden)
        torch.testing.assert_close(model.features(x)[0].flatten(2).mT, tokens[:, 1:])
        torch.testing.assert_close(model(x), model.head(norm(tokens[:, 0], model.norm)))


def test_images_are_padded_and_positions_interpolated():
    model = make(InLineDeiT)
    x = image(model, size=(41, 70))
    assert model.features(x)[0].shape[2:] == (3, 5)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 10, 0, 7))))
    with torch.no_grad():  # the same position everywhere is that also on a larger map
        model.positions[:, 1:] = model.positions[:, 1:2].clone()
        y = model(x)
        model.side, model.positions = 1, nn.Parameter(model.positions[:, :2])
    torch.testing.assert_close(model(x), y)


def test_agent_attention_in_the_first_layers():
    model = AgentDeiT(**AgentDeiT.example)
    assert [type(b.mixer) for b in model.blocks] == [AgentAttentionDeiT, AgentAttentionDeiT, DenseAttention]
    mixers = [b.mixer for b in AgentDeiT(**{**AgentDeiT.example, "agent_layers": None}).blocks]
    assert all(isinstance(m, AgentAttentionDeiT) for m in mixers)


def test_dense_attention_is_softmax_attention():
    torch.manual_seed(0)
    mixer = DenseAttention(6, heads=2).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = (x[0] @ mixer.qkv.weight.T + mixer.qkv.bias).split(6, -1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        weights = (q[:, h] @ k[:, h].T / 3**0.5).exp()
        heads.append(weights @ v[:, h] / weights.sum(-1, keepdim=True))
    y = torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x, size=(2, 2))[0], y)


def test_authors_names_of_agent_deit():
    model = make(AgentDeiT)
    names = (
        (r"class_token", "cls_token"),
        (r"positions", "pos_embed"),
        (r"embed\.", "patch_embed.proj."),
        (r"blocks\.(\d)\.mixer\.(core\.)?", r"blocks.\1.attn."),
    )
    theirs = {}
    for name, value in model.state_dict().items():
        for pattern, new in names:
            name = re.sub("^" + pattern, new, name)
        theirs[name] = value
    assert {"blocks.0.attn.ca_bias", "blocks.1.attn.dwc.weight", "blocks.2.attn.qkv.weight"} <= theirs.keys()
    other = authors.load(AgentDeiT(**{**AgentDeiT.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))
