"""TAP-FAN: a transcription around its mixers, positions, the loss in training, authors' names."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.models.tap_fan import TAPFAN, FourierPositions
from heedful.ops.attention_diversity import attention_diversification_loss
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def attend(q, k, v, heads):
    """q (b, n, c), k and v (b, m, c): what comes out, and the weights."""
    width, outs, maps = q.shape[-1] // heads, [], []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        weights = (q[..., own] @ k[..., own].mT / width**0.5).exp()
        maps.append(weights / weights.sum(-1, keepdim=True))
        outs.append(maps[-1] @ v[..., own])
    return torch.cat(outs, -1), torch.stack(maps, 1)


def line(x, layer):
    return x @ layer.weight.T + layer.bias


def test_equals_transcription():
    model = make(TAPFAN)
    x = image(model)
    y = x
    for stage in (0, 2, 4, 6):
        part = model.stem[stage]
        y = part.norm(F.conv2d(y, part.conv.weight, stride=2, padding=1))
        y = F.gelu(y) if stage < 6 else y
    y = y + model.positions(y)
    maps = []
    for block in model.blocks:
        tokens = norm(block.pool(y).flatten(2).mT, block.norm1)
        k, v = line(tokens, block.attn.kv).split(16, -1)
        mixed, weights = attend(line(tokens, block.attn.q), k, v, 2)
        maps.append(weights)
        tokens = y.flatten(2).mT + block.gamma1.gamma * line(mixed, block.attn.proj)
        wide = block.mlp(norm(tokens, block.norm2).mT.unflatten(2, y.shape[2:])).flatten(2).mT
        y = (tokens + block.gamma2.gamma * wide).mT.unflatten(2, y.shape[2:])
    torch.testing.assert_close(model.features(x)[0], y)
    torch.testing.assert_close(model.attention_maps(x), maps)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), y.flatten(2).mT], 1)
    for block in model.class_blocks:
        u = norm(tokens, block.norm1)
        q, k, v = (line(u, part) for part in (block.attn.query, block.attn.key, block.attn.value))
        c = line(attend(q[:, :1], k, v, 2)[0], block.attn.out)
        tokens = norm(tokens + block.gamma1.gamma * torch.cat([c, u[:, 1:]], 1), block.norm2)
        first = tokens[:, :1] + block.gamma2.gamma * line(
            F.gelu(line(tokens[:, :1], block.mlp.fc1)), block.mlp.fc2
        )
        tokens = torch.cat([first, 2 * tokens[:, 1:]], 1)
    torch.testing.assert_close(model(x), line(norm(tokens[:, 0], model.norm), model.head))


def test_positions_one_by_one():
    part = FourierPositions(5).double()
    weight = part.projection.weight[:, :, 0, 0]
    y = part(torch.zeros(1, 5, 3, 4, dtype=torch.float64))
    for row in range(3):
        for column in range(4):
            waves = []
            for place, n in ((row + 1, 3), (column + 1, 4)):
                angle = place / (n + 1e-6) * 2 * math.pi
                for i in range(32):
                    turn = angle / 10000 ** (2 * (i // 2) / 32)
                    waves.append(math.cos(turn) if i % 2 else math.sin(turn))
            expected = weight @ torch.tensor(waves, dtype=torch.float64) + part.projection.bias
            # Angles are made in float32.
            torch.testing.assert_close(y[0, :, row, column], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_stands_on_the_model_in_training():
    how = {"threshold": 0.9}  # attention of a new model is nearly uniform
    model = make(TAPFAN, **how)
    x = image(model)
    model(x)
    assert not model.aux_losses
    model.train()
    model(x)
    loss = model.aux_losses["attention_diversification"]
    state = copy.deepcopy(model)  # the losses stay behind
    assert not state.aux_losses
    loss.backward()
    assert model.blocks[0].attn.q.weight.grad.any()
    # With frozen statistics the maps are those of eval.
    model = make(TAPFAN, **how).train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    y = model(x)
    loss = model.aux_losses["attention_diversification"]
    torch.testing.assert_close(loss, attention_diversification_loss(model.attention_maps(x), **how))
    torch.testing.assert_close(y, model.eval()(x))
    model = make(TAPFAN, threshold=None).train()
    model(x)
    assert not model.aux_losses


def test_convnext_stem():
    model = make(TAPFAN, stem="convnext")
    x = image(model, size=(32, 48))
    assert model.features(x)[0].shape == (2, 16, 2, 3)
    block = model.stem[1][0]
    y = torch.randn(1, 128, 4, 4, dtype=torch.float64)
    z = F.conv2d(y, block.dwconv.weight, block.dwconv.bias, padding=3, groups=128).movedim(1, -1)
    z = line(F.gelu(line(norm(z, block.norm), block.mlp.fc1)), block.mlp.fc2) * block.gamma.gamma
    torch.testing.assert_close(block(y), y + z.movedim(-1, 1))


NAMES = (
    (r"(.*gamma[12])\.gamma", r"\1"),
    (r"class_token", "cls_token"),
    (r"positions\.projection(.*)", r"pos_embed.token_projection\1"),
    (r"stem\.(\d)\.conv(.*)", r"patch_embed.proj.\1.0\2"),
    (r"stem\.(\d)\.norm(.*)", r"patch_embed.proj.\1.1\2"),
    (r"(blocks\.\d)\.pool(.*)", r"\1.dilation_predictor\2"),
    (r"(blocks\.\d\.mlp)\.query(.*)", r"\1.q\2"),
    (r"(blocks\.\d\.mlp)\.norm(.*)", r"\1.norm_v\2"),
    (r"(blocks\.\d\.mlp)\.(fc|gamma)(.*)", r"\1.mlp_v.\2\3"),
    (r"(blocks\.\d\.mlp)\.(conv|bn)(.*)", r"\1.mlp_v.dwconv.\2\3"),
    (r"class_(blocks\.\d\.attn\.[qkv])(uery|ey|alue)(.*)", r"cls_attn_\1\3"),
    (r"class_(blocks\.\d\.attn\.)out(.*)", r"cls_attn_\1proj\2"),
)


def test_authors_names():
    model = make(TAPFAN)
    theirs = {}
    for name, value in model.state_dict().items():
        if name.endswith("temperature"):
            value = value[:, None, None]
        for ours, told in NAMES:
            name = re.sub(f"^{ours}$", told, name)
        theirs[re.sub("^class_blocks", "cls_attn_blocks", name)] = value
    assert {"blocks.1.gamma1", "blocks.0.mlp.mlp_v.gamma", "cls_attn_blocks.1.attn.q.weight"} <= theirs.keys()
    other = authors.load(TAPFAN(**{**TAPFAN.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="stem is 'patch', must be one of 'conv', 'convnext'"):
        TAPFAN(stem="patch")
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        TAPFAN(heads=5)
