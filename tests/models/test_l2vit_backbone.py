"""The blocks of L2ViT against loops, and how its model joins them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.models.l2vit import GlobalBlock, L2ViT, WindowBlock
from heedful.testing.check_backbone import image, make


def randomised(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in block.parameters():
        p.data.normal_(std=0.3)
    for name, buffer in block.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return block.double().eval()


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Of rows of channels."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Of a (height, width, c) map."""
    side = conv.weight.shape[-1] // 2
    y = F.conv2d(x.permute(2, 0, 1)[None], conv.weight, conv.bias, padding=side, groups=x.shape[2])
    return y[0].permute(1, 2, 0)


def heads_of(x: Tensor, m: nn.Module) -> list[list[Tensor]]:
    """q, k, v of each head."""
    y = x @ m.qkv.weight.T + m.qkv.bias
    return [list(t.split(x.shape[-1] // m.heads, -1)) for t in y.split(x.shape[-1], -1)]


def mlp(x: Tensor, block: nn.Module) -> Tensor:
    return block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x, block.norm2))))


def window_block(m: WindowBlock, x: Tensor) -> Tensor:
    height, width, dim = x.shape
    w = m.mixer.window
    x = x + depthwise(x, m.positions[0])
    padded = x.new_zeros(-(-height // w) * w, -(-width // w) * w, dim)
    padded[:height, :width] = norm(x, m.norm1)
    y = torch.zeros_like(padded)
    for i in range(0, len(padded), w):
        for j in range(0, padded.shape[1], w):
            heads = []
            for q, k, v in zip(
                *heads_of(padded[i : i + w, j : j + w].reshape(w * w, dim), m.mixer), strict=True
            ):
                weights = (q @ k.T / q.shape[-1] ** 0.5).exp()
                heads.append(weights @ v / weights.sum(-1, keepdim=True))
            y[i : i + w, j : j + w] = torch.cat(heads, -1).view(w, w, dim)
    x = x + (y @ m.mixer.proj.weight.T + m.mixer.proj.bias)[:height, :width]
    x = x + depthwise(x, m.positions[1])
    return x + mlp(x, m)


def global_block(m: GlobalBlock, x: Tensor) -> Tensor:
    height, width, dim = x.shape
    x = x + depthwise(x, m.positions[0])
    heads = []
    tokens = norm(x, m.norm1).reshape(-1, dim)
    for h, (q, k, v) in enumerate(zip(*heads_of(tokens, m.mixer), strict=True)):
        scores = q.relu() @ k.relu().T
        total = scores.sum(-1, keepdim=True)
        heads.append(m.mixer.temperature[h] * (scores / torch.where(total > 100, total, 100)) @ v)
    y = torch.cat(heads, -1) @ m.mixer.proj.weight.T + m.mixer.proj.bias
    x = x + y.view(height, width, dim)
    y = F.gelu(depthwise(norm(x, m.norm3), m.local.conv1))
    bn = m.local.bn
    y = (y - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
    x = x + depthwise(y, m.local.conv2)
    return x + mlp(x, m)


def test_blocks_equal_transcriptions_with_gradients():
    for block, literal in (
        (WindowBlock(12, 3, 4, 30), window_block),
        (GlobalBlock(12, 3, 30), global_block),
    ):
        randomised(block)
        x = torch.randn(2, 6, 7, 12, dtype=torch.float64, requires_grad=True)
        theirs = torch.stack([literal(block, one) for one in x])
        ours = block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(ours, theirs)
        wrt, up = (x, *block.parameters()), torch.randn_like(x)
        torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(theirs, wrt, up))


def test_blocks_by_turns_and_maps_padded_at_the_right_and_bottom():
    model = make(L2ViT, depths=(3, 1, 1, 1))
    assert [type(b) for b in model.stages[0]] == [WindowBlock, GlobalBlock, WindowBlock]
    x = image(model, size=(30, 41))
    assert [tuple(y.shape[2:]) for y in model.features(x)] == [(8, 11), (4, 6), (2, 3), (1, 2)]
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))
    last = model.features(x)[-1]
    y = norm(last.flatten(2).transpose(1, 2), model.norm).mean(1)
    torch.testing.assert_close(model.pooled(x), y)
