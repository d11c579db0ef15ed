from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.efficientvit_cga import CascadedGroupAttention


def conv_bn(m, x: Tensor) -> Tensor:
    """Convolution as a sum over shifts, then the batch norm by its stored statistics; one image."""
    weight, side = m.c.weight, m.c.weight.shape[-1]
    height, width = x.shape[1:]
    full = F.pad(x, (side // 2,) * 4)
    y = 0
    for i in range(side):
        for j in range(side):
            part = full[:, i : i + height, j : j + width]
            if weight.shape[1] == len(x):
                y = y + torch.einsum("oc,cyx->oyx", weight[:, :, i, j], part)
            else:
                y = y + weight[:, 0, i, j][:, None, None] * part
    bn = m.bn
    mean, std = bn.running_mean, (bn.running_var + 1e-5).sqrt()
    return ((y.movedim(0, -1) - mean) / std * bn.weight + bn.bias).movedim(-1, 0)


def cascade(m: CascadedGroupAttention, x: Tensor) -> Tensor:
    """One window: heads in turn, one query at a time."""
    d, kd = m.dim // m.heads, m.key_dim
    tokens = [(y, z) for y in range(x.shape[1]) for z in range(x.shape[2])]
    given, outputs = 0, []
    for h in range(m.heads):
        given = given + x[h * d : (h + 1) * d]
        qkv = conv_bn(m.qkvs[h], given)
        q, k, v = conv_bn(m.dws[h], qkv[:kd]), qkv[kd : 2 * kd], qkv[2 * kd :]
        given = torch.zeros_like(v)
        rows = []
        for a in tokens:
            logits = [
                q[:, a[0], a[1]] @ k[:, b[0], b[1]] / kd**0.5
                + m.attention_biases[h, abs(a[0] - b[0]) * m.window + abs(a[1] - b[1])]
                for b in tokens
            ]
            weights = torch.stack(logits).exp()
            rows.append(torch.stack([v[:, b[0], b[1]] for b in tokens], 1) @ (weights / weights.sum()))
        given = torch.stack(rows, 1).view_as(v)
        outputs.append(given)
    return conv_bn(m.proj[1], torch.cat(outputs).clamp(min=0))


def transcription(m: CascadedGroupAttention, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    p = m.window
    if height <= p and width <= p:
        return torch.stack([cascade(m, image) for image in x])
    full = x.new_zeros(*x.shape[:2], -(-height // p) * p, -(-width // p) * p)
    full[:, :, :height, :width] = x
    y = torch.zeros_like(full)
    for b in range(len(x)):
        for i in range(0, full.shape[2], p):
            for j in range(0, full.shape[3], p):
                y[b, :, i : i + p, j : j + p] = cascade(m, full[b, :, i : i + p, j : j + p])
    return y[:, :, :height, :width]


def make(dim: int = 9, heads: int = 3, key_dim: int = 2, window: int = 3, kernels: tuple = (3, 5, 1)):
    torch.manual_seed(0)
    m = CascadedGroupAttention(
        dim, heads=heads, key_dim=key_dim, window=window, kernels=kernels, dtype=torch.float64
    )
    with torch.no_grad():
        for name, array in m.state_dict().items():
            if array.is_floating_point():
                array.normal_()
            if name.endswith("running_var"):
                array.abs_().add_(0.5)
    return m.eval()


@pytest.mark.parametrize("size", [(3, 3), (2, 3), (1, 4), (5, 4)])
def test_equals_transcription_with_gradients(size):
    m = make()
    x = torch.randn(2, 9, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_one_head_is_ordinary_attention_with_bias():
    m = make(dim=6, heads=1, key_dim=4, window=4, kernels=(3,))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    q, k, v = m.qkvs[0](x).split([4, 4, 6], 1)
    q, k, v = (t.flatten(2).mT for t in (m.dws[0](q), k, v))
    place = torch.arange(16)
    rows, columns = (
        (t[:, None] - t).abs() for t in (place.div(4, rounding_mode="floor"), place.remainder(4))
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.attention_biases[0, rows * 4 + columns])
    torch.testing.assert_close(m(x), m.proj(y.mT.unflatten(2, (4, 4))))


def test_a_head_sees_its_slice_and_those_before():
    m = make()
    with torch.no_grad():  # the output shows the heads as they are
        for array, value in (
            (m.proj[1].c.weight, torch.eye(9)[:, :, None, None]),
            (m.proj[1].bn.weight, torch.ones(9)),
            (m.proj[1].bn.bias, torch.zeros(9)),
            (m.proj[1].bn.running_mean, torch.zeros(9)),
            (m.proj[1].bn.running_var, torch.ones(9)),
        ):
            array.copy_(value)
        for qkv in m.qkvs:
            qkv.bn.bias += 9  # values stay positive, so that relu hides nothing
    x = torch.randn(1, 9, 3, 3, dtype=torch.float64)
    for changed_slice in range(3):
        changed = x.clone()
        changed[:, 3 * changed_slice : 3 * changed_slice + 3] += 0.5
        moved = (m(changed) - m(x)).abs().amax((0, 2, 3)).view(3, 3).amax(1) > 1e-9
        assert moved.tolist() == [head >= changed_slice for head in range(3)]


def test_parameter_count():
    # First attention of EfficientViT-M0: qkv, depthwise, projection, biases of a 7 x 7 window.
    m = CascadedGroupAttention(64)
    per_head = 16 * (32 + 16) + 2 * (32 + 16) + 16 * 25 + 2 * 16 + 49
    assert sum(p.numel() for p in m.parameters()) == 4 * per_head + 64 * 64 + 2 * 64
    assert m.proj[1].bn.weight.eq(0).all()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide dim, which is 16"):
        CascadedGroupAttention(16, heads=3)
    with pytest.raises(ValueError, match=r"kernels is \(3, 3\), must be odd sides, one for each of 4 heads"):
        CascadedGroupAttention(16, kernels=(3, 3))
    with pytest.raises(ValueError, match=r"kernels is \(3, 4\), must be odd"):
        CascadedGroupAttention(16, heads=2, kernels=(3, 4))
    with pytest.raises(ValueError, match="window is 0"):
        CascadedGroupAttention(16, window=0)
