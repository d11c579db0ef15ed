from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful import attention
from heedful.mixers.grid.maxvit import MultiAxisAttention
from heedful.patterns import Blocks, Grid


def transcription(m: MultiAxisAttention, x: Tensor) -> Tensor:
    """One image, one head, one query at a time; a query looks through the whole map for its group."""
    p, dim = m.size, m.dim
    height, width = x.shape[2:]
    cells = (-(-height // p), -(-width // p))  # of the padded map
    d = dim // m.heads

    def group_and_place(y: int, z: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if m.partition == "block":
            return (y // p, z // p), (y % p, z % p)
        return (y % cells[0], z % cells[1]), (y // cells[0], z // cells[1])

    everywhere = [(y, z) for y in range(height) for z in range(width)]
    images = []
    for image in x:
        qkv = {at: m.qkv.weight @ image[:, at[0], at[1]] + m.qkv.bias for at in everywhere}
        out = []
        for at in everywhere:
            group, i = group_and_place(*at)
            seen = [other for other in everywhere if group_and_place(*other)[0] == group]
            heads = []
            for h in range(m.heads):
                q = qkv[at][h * d : (h + 1) * d] * d**-0.5
                logits = []
                for other in seen:
                    j = group_and_place(*other)[1]
                    k = qkv[other][dim + h * d : dim + (h + 1) * d]
                    logits.append(q @ k + m.relative_bias[h, j[0] - i[0] + p - 1, j[1] - i[1] + p - 1])
                weights = torch.stack(logits).exp()
                values = torch.stack([qkv[o][2 * dim + h * d : 2 * dim + (h + 1) * d] for o in seen])
                heads.append(weights / weights.sum() @ values)
            out.append(m.proj.weight @ torch.cat(heads) + m.proj.bias)
        images.append(torch.stack(out, 1).unflatten(1, (height, width)))
    return torch.stack(images)


def make(partition: str, size: int, dim: int = 8, head_dim: int = 4) -> MultiAxisAttention:
    torch.manual_seed(0)
    m = MultiAxisAttention(dim, head_dim=head_dim, size=size, partition=partition, dtype=torch.float64)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.normal_(std=0.5)
    return m


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize(("size", "shape"), [(2, (4, 6)), (3, (4, 7)), (3, (2, 1))])
def test_equals_transcription_with_gradients(partition, size, shape):
    m = make(partition, size)
    x = torch.randn(2, 8, *shape, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_without_bias_it_is_the_pattern(partition):
    m = make(partition, 3)
    with torch.no_grad():
        m.relative_bias.zero_()
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    q, k, v = m.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    pattern = {"block": Blocks, "grid": Grid}[partition]((6, 9), 3)
    y = m.proj(attention(q, k, v, pattern=pattern).transpose(1, 2).flatten(2)).mT.unflatten(2, (6, 9))
    torch.testing.assert_close(m(x), y)


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_one_group_is_full_attention(partition):
    m = make(partition, 4)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    q, k, v = m.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(y).mT.unflatten(2, (4, 4)))


def test_grid_is_block_of_the_reordered_map():
    grid, block = make("grid", 3), make("block", 3)
    x = torch.randn(1, 8, 6, 12, dtype=torch.float64)
    rows = torch.arange(6).view(3, 2).T.flatten()  # tokens 2 apart come to lie together
    columns = torch.arange(12).view(3, 4).T.flatten()
    torch.testing.assert_close(grid(x)[:, :, rows][..., columns], block(x[:, :, rows][..., columns]))


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_groups_do_not_leak(partition):
    m = make(partition, 2)
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 1, 0] += 1
    touched = ((m(changed) - m(x)).abs().amax(1)[0] > 1e-12).nonzero().tolist()
    group = {"block": [[0, 0], [0, 1], [1, 0], [1, 1]], "grid": [[1, 0], [1, 3], [3, 0], [3, 3]]}
    assert touched == group[partition]


def test_parameter_count():
    m = MultiAxisAttention(64)
    assert sum(p.numel() for p in m.parameters()) == 4 * 64 * 65 + 2 * 13**2


def test_dropout_of_weights():
    x = torch.randn(1, 8, 4, 4)
    m = MultiAxisAttention(8, head_dim=4, size=2, dropout=0.5)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="head_dim is 32, must divide dim, which is 48"):
        MultiAxisAttention(48)
    with pytest.raises(ValueError, match="partition is 'axis', must be one of 'block', 'grid'"):
        MultiAxisAttention(32, partition="axis")
    with pytest.raises(ValueError, match="size is 0"):
        MultiAxisAttention(32, size=0)
