"""The two architectures of SpectFormer, and the authors' names of the hierarchical one."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from heedful import authors
from heedful.mixers.grid.spectformer import SpectralGating
from heedful.models.spectformer import HierarchicalSpectFormer, SpectFormer
from heedful.models.spectformer_blocks import MapAttention
from heedful.testing.check_backbone import image, make


def norm(x, layer, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def norm2d(x, layer, eps=1e-6):
    return norm(x.movedim(1, -1), layer, eps).movedim(-1, 1)


def test_columnar_equals_transcription():
    model = make(SpectFormer)
    x = image(model, size=(48, 48))
    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).movedim(1, 3).flatten(3).flatten(1, 2)
    tokens = patches @ model.embed.weight.flatten(1).T + model.embed.bias + model.positions
    for block in model.filters:  # one residual
        y = norm(tokens, block.norm1).mT.unflatten(2, (3, 3))
        y = norm(block.filter(y).flatten(2).mT, block.norm2)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    for block in model.blocks:
        tokens = tokens + block.mixer(norm(tokens, block.norm1), size=(3, 3))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(norm(tokens, block.norm2))))
    torch.testing.assert_close(model.features(x)[0].flatten(2).mT, tokens)
    torch.testing.assert_close(model(x), model.head(norm(tokens, model.norm).mean(1)))


def test_hierarchical_equals_transcription():
    model = make(HierarchicalSpectFormer)
    given = x = image(model)
    for stage, (part, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        if stage == 0:
            for i, stride, padding in ((0, 2, 3), (3, 1, 1), (6, 1, 1)):
                x = F.conv2d(x, part[i].weight, None, stride=stride, padding=padding)
                bn = part[i + 1]
                scale = bn.weight / (bn.running_var + 1e-5).sqrt()
                x = (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]
                x = x.relu()
            part = part[9:]
        x = F.conv2d(x, part[0].weight, part[0].bias, stride=2, padding=1)
        x = blocks[0](norm2d(x, part[1], 1e-5))
        x = norm2d(x, model.norms[stage]) if stage < 3 else x
        torch.testing.assert_close(model.features(given)[stage], x)
    tokens = x.flatten(2).mT
    tokens = model.class_block(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
    tokens = norm(tokens, model.norm)
    votes = torch.stack([model.token_head(t) for t in tokens[:, 1:].unbind(1)]).max(0).values
    torch.testing.assert_close(model(given), model.head(tokens[:, 0]) + votes / 2)


def test_filters_then_attention():
    model = HierarchicalSpectFormer(**HierarchicalSpectFormer.example)
    kinds = [type(stage[0].mixer) for stage in model.stages]
    assert kinds == [SpectralGating, SpectralGating, MapAttention, MapAttention]
    assert [tuple(s[0].mixer.size) for s in model.stages[:2]] == [(16, 16), (8, 8)]


def test_without_token_labels_the_class_token_alone_decides():
    with_votes = HierarchicalSpectFormer()
    plain = HierarchicalSpectFormer(token_labels=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (with_votes, plain)]
    assert count == [22_226_928, 21_777_928]
    model = make(HierarchicalSpectFormer, token_labels=False)
    x = image(model)
    torch.testing.assert_close(model(x), model.head(model.pooled(x)))


def test_authors_names_of_the_hierarchical_form():
    model = make(HierarchicalSpectFormer)
    names = (
        (r"downsample\.0\.9\.", "patch_embed1.proj."),
        (r"downsample\.0\.10\.", "patch_embed1.norm."),
        (r"downsample\.0\.", "patch_embed1.conv."),
        (r"downsample\.(\d)\.0\.", lambda m: f"patch_embed{int(m[1]) + 1}.proj."),
        (r"downsample\.(\d)\.1\.", lambda m: f"patch_embed{int(m[1]) + 1}.norm."),
        (r"stages\.(\d)\.(\d)\.", lambda m: f"block{int(m[1]) + 1}.{m[2]}."),
        (r"norms\.(\d)\.", lambda m: f"norm{int(m[1]) + 1}."),
        (r"norm\.", "norm4."),
        (r"class_block\.", "post_network.0."),
        (r"token_head\.", "aux_head."),
    )
    inner = (
        (r"(mixer\.)?attention\.query\.", "attn.q."),
        (r"(mixer\.)?attention\.(key|value)\.", r"attn.\2."),
        (r"(mixer\.)?attention\.out\.", "attn.proj."),
        (r"mixer\.complex_weight", "attn.complex_weight"),
        (r"(block.*)\.dwconv\.", r"\1.mlp.dwconv.dwconv."),
        (r"(block.*)\.(fc[12])\.", r"\1.mlp.\2."),
    )
    theirs = {}
    for name, value in model.state_dict().items():
        for pattern, new in names:
            if re.match(pattern, name):
                name = re.sub("^" + pattern, new, name)
                break
        for pattern, new in inner:
            name = re.sub(pattern, new, name)
        name = name.replace(".mlp.mlp.", ".mlp.")
        theirs[name] = value.flatten(1) if re.search(r"mlp\.fc\d\.weight", name) else value
    for name in [n for n in theirs if ".attn.key." in n]:  # keys and values in one projection
        key, value = theirs.pop(name), theirs.pop(name.replace("key", "value"))
        theirs[name.replace("key", "kv")] = torch.cat([key, value])
    kind = HierarchicalSpectFormer(**{**HierarchicalSpectFormer.example, "classes": 3}).double()
    assert torch.equal(authors.load(kind, theirs).eval()(image(model)), model(image(model)))
