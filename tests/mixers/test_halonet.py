from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful import attention
from heedful.mixers.grid.halonet import HaloAttention
from heedful.patterns import Halo


def project(conv, x: Tensor) -> Tensor:
    bias = 0 if conv.bias is None else conv.bias[:, None, None]
    return torch.einsum("oc,cyx->oyx", conv.weight[:, :, 0, 0], x) + bias


def transcription(m: HaloAttention, x: Tensor) -> Tensor:
    """One image, one head, one query at a time; keys off the map are zeros."""
    b, h, win, d = m.block_size, m.halo_size, m.window, m.head_dim
    e, s = m.dim_out // m.heads, m.query_stride
    height, width = x.shape[2:]
    images = []
    for image in x:
        q, kv = project(m.q, image[:, ::s, ::s]), project(m.kv, image)
        heads = []
        for head in range(m.heads):
            own = kv[head * (d + e) : (head + 1) * (d + e)]
            rows = []
            for y in range(q.shape[1]):
                for z in range(q.shape[2]):
                    query = q[head * d : (head + 1) * d, y, z]
                    iy, top = y % (b // s), y // (b // s) * b - h
                    ix, left = z % (b // s), z // (b // s) * b - h
                    logits, values = [], []
                    for jy in range(win):
                        for jx in range(win):
                            on_map = 0 <= top + jy < height and 0 <= left + jx < width
                            if m.mask_padding and not on_map:
                                continue
                            pair = own[:, top + jy, left + jx] if on_map else torch.zeros_like(own[:, 0, 0])
                            place = m.pos_embed.height_rel[jy - iy + win - 1]
                            place = place + m.pos_embed.width_rel[jx - ix + win - 1]
                            position = query @ place * (d**-0.5 if m.scale_pos_embed else 1)
                            logits.append(query @ pair[:d] / d**0.5 + position)
                            values.append(pair[d:])
                    weights = torch.stack(logits).exp()
                    rows.append(weights / weights.sum() @ torch.stack(values))
            heads.append(torch.stack(rows, 1).unflatten(1, q.shape[1:]))
        full = torch.cat(heads)
        if m.average:
            means = [
                [full[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, full.shape[2], 2)]
                for i in range(0, full.shape[1], 2)
            ]
            full = torch.stack([torch.stack(line, -1) for line in means], 1)
        images.append(full)
    return torch.stack(images)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_size": 2, "halo_size": 1}, (4, 6)),
        ({"block_size": 3, "halo_size": 1, "qkv_bias": True, "scale_pos_embed": True}, (4, 5)),
        ({"block_size": 3, "halo_size": 1, "mask_padding": True}, (4, 2)),
        ({"block_size": 2, "halo_size": 1, "stride": 2, "dim_out": 6, "head_dim": 3}, (4, 5)),
        ({"block_size": 2, "halo_size": 1, "stride": 2, "avg_down": True}, (4, 3)),
        ({"block_size": 3, "halo_size": 1, "stride": 2}, (5, 3)),
    ],
)
def test_equals_transcription_with_gradients(options, size):
    torch.manual_seed(0)
    m = HaloAttention(4, heads=2, dtype=torch.float64, **options)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_without_positions_and_padding_it_is_the_halo_pattern():
    torch.manual_seed(0)
    m = HaloAttention(8, heads=2, block_size=3, halo_size=2, mask_padding=True, dtype=torch.float64)
    with torch.no_grad():
        m.pos_embed.height_rel.zero_()
        m.pos_embed.width_rel.zero_()
    x = torch.randn(2, 8, 8, 7, dtype=torch.float64)
    q = m.q(x).flatten(2).unflatten(1, (2, -1)).mT
    k, v = m.kv(x).flatten(2).unflatten(1, (2, -1)).mT.chunk(2, -1)
    y = attention(q, k, v, pattern=Halo((8, 7), 3, 2)).mT.flatten(1, 2).unflatten(2, (8, 7))
    torch.testing.assert_close(m(x), y)


def test_one_block_without_halo_is_full_attention():
    torch.manual_seed(0)
    m = HaloAttention(8, heads=2, block_size=4, halo_size=0, dtype=torch.float64)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    q = m.q(x).flatten(2).unflatten(1, (2, -1)).mT
    k, v = m.kv(x).flatten(2).unflatten(1, (2, -1)).mT.chunk(2, -1)
    place = torch.arange(16)
    rows = m.pos_embed.height_rel[place[None] // 4 - place[:, None] // 4 + 3]
    columns = m.pos_embed.width_rel[place[None] % 4 - place[:, None] % 4 + 3]
    bias = torch.einsum("bhid,ijd->bhij", q, rows + columns)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).mT.flatten(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(m(x), y)


def test_blocks_of_one_pixel_are_centred_local_attention():
    torch.manual_seed(0)
    m = HaloAttention(8, heads=1, block_size=1, halo_size=1, dtype=torch.float64)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    moved = torch.roll(x, (1, 1), (2, 3))
    inner = (slice(None), slice(None), slice(2, -1), slice(2, -1))
    torch.testing.assert_close(m(moved)[inner], torch.roll(m(x), (1, 1), (2, 3))[inner])
    changed = x.clone()
    changed[:, :, 2, 2] += 1
    touched = ((m(changed) - m(x)).abs().amax(1)[0] > 1e-12).nonzero().tolist()
    assert touched == [[i, j] for i in (1, 2, 3) for j in (1, 2, 3)]


def test_parameter_count_and_shapes():
    m = HaloAttention(64, dim_out=96, heads=4, block_size=8, halo_size=3, qk_ratio=0.5, stride=2)
    # q 64 -> 48, keys and values 64 -> 48 + 96, two tables of 27 places.
    assert sum(p.numel() for p in m.parameters()) == 64 * 48 + 64 * (48 + 96) + 2 * 27 * 12
    assert set(dict(m.named_parameters())) == {
        "q.weight",
        "kv.weight",
        "pos_embed.height_rel",
        "pos_embed.width_rel",
    }
    assert m(torch.randn(1, 64, 13, 8)).shape == (1, 96, 7, 4)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide dim_out"):
        HaloAttention(16, heads=3)
    with pytest.raises(ValueError, match="stride is 3, must be one of 1, 2"):
        HaloAttention(16, stride=3)
    with pytest.raises(ValueError, match="halo_size is -1, must be at least 0"):
        HaloAttention(16, halo_size=-1)
    with pytest.raises(ValueError, match="block_size is 0"):
        HaloAttention(16, block_size=0)
