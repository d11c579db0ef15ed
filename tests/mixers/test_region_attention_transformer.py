from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.mixers.grid.region_attention_transformer import RegionAttention
from heedful.routing.regions import label_map, region_table


def transcription(m: RegionAttention, x: Tensor, labels: Tensor) -> Tensor:
    """One pixel and one head at a time; others' logits are lowered by 1000."""
    d = m.dim // m.heads
    images = []
    for image, label in zip(x.flatten(2), labels.flatten(1), strict=True):
        qkv = m.qkv.weight[:, :, 0, 0] @ image + m.qkv.bias[:, None]
        pixels = []
        for i in range(image.shape[1]):
            lowered = torch.where(label == label[i], 0.0, -1000.0)
            heads = []
            for h in range(m.heads):
                q, k, v = (qkv[s * m.dim + h * d : s * m.dim + (h + 1) * d] for s in range(3))
                logits = q[:, i] @ k / m.heads**0.5 + lowered
                weight = (logits - logits.max()).exp()
                heads.append(v @ (weight / weight.sum()))
            pixels.append(m.proj.weight[:, :, 0, 0] @ torch.cat(heads) + m.proj.bias)
        images.append(torch.stack(pixels, 1).unflatten(1, x.shape[2:]))
    return torch.stack(images)


def make(dim: int = 6, heads: int = 3) -> RegionAttention:
    torch.manual_seed(0)
    return RegionAttention(dim, heads=heads, dtype=torch.float64)


@pytest.mark.parametrize("regions", [1, 3, 40])
def test_equals_transcription_with_gradients(regions):
    m = make()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, regions, (2, 4, 5))
    ours, wanted = m(x, labels=labels), transcription(m, x, labels)
    torch.testing.assert_close(ours, wanted)
    if regions == 1:
        torch.testing.assert_close(m(x), wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    ours, wanted = torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up)
    # The bias of all keys changes nothing: its gradient is rounding, hence the absolute tolerance.
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-10)


def test_a_region_of_its_own_gives_the_value():
    m = make()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    labels = torch.randperm(20).view(1, 4, 5).expand(2, -1, -1)
    torch.testing.assert_close(m(x, labels=labels), m.proj(m.qkv(x)[:, 12:]))


def test_other_regions_and_names_do_not_matter():
    m = make()
    x = torch.randn(1, 6, 9, 11, dtype=torch.float64)
    labels = torch.randint(0, 4, (1, 9, 11))
    own = labels[:, None] == 2
    y = m(x, labels=labels)
    torch.testing.assert_close(m(torch.where(own, x, x + 1), labels=labels) * own, y * own)
    names = torch.tensor([7.5, -3.0, 0.25, 2.0])
    torch.testing.assert_close(m(x, labels=names[labels]), y)


def test_the_table_visits_few_blocks():
    labels = torch.randint(0, 8, (2, 1000)).sort(dim=1)[0]
    table = region_table(labels, block_size=16)
    assert torch.equal(table.dense(2)[:, 0], labels[:, :, None] == labels[:, None])
    assert table.visited() < 0.18  # an eighth is visible


def test_the_smallest_mask_wins():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True  # 4 pixels
    masks[1, :3] = True  # 15
    masks[2, 2, 2] = True  # 1
    wanted = torch.tensor([[1, 1, 1, 1, 1], [1, 2, 2, 1, 1], [1, 2, 3, 1, 1], [4, 4, 4, 4, 4]])
    assert torch.equal(label_map(masks), wanted)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4, 6\), must be \(2, 4, 5\), one a pixel"):
        make()(torch.zeros(2, 6, 4, 5, dtype=torch.float64), labels=torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="heads is 4, must divide dim"):
        RegionAttention(6, heads=4)
