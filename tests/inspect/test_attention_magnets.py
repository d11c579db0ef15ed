"""RefAM: maps of words from a diffusion transformer, its global sinks, and what magnets do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful.inspect import (
    AttentionMagnets,
    capture,
    content_words,
    find_global_sinks,
    heatmap_peak,
    with_magnets,
)
from tests.inspect.test_capture import largest


class Joint(nn.Module):
    """One block of a diffusion transformer: text and image in one softmax."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.split(x))
        return x + self.out(y.transpose(1, 2).flatten(2))


class DiT(nn.Module):
    def __init__(self, blocks=4, dim=12, heads=3):
        super().__init__()
        self.blocks = nn.ModuleList(Joint(dim, heads) for _ in range(blocks))

    def forward(self, text, image):
        x = torch.cat([text, image], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


def sharp(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model.double().eval()


def dense(model, text, image):
    """(blocks, b, n + m, n + m): the weights of each block, the mean over its heads."""
    x, tables = torch.cat([text, image], dim=1), []
    for block in model.blocks:
        q, k, _ = block.split(x)
        tables.append((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1))
        x = block(x)
    return torch.stack(tables)


def inputs(words=5, grid=(3, 4), batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, words, 12).double(), torch.randn(batch, grid[0] * grid[1], 12).double()


def test_map_by_loops():
    torch.manual_seed(0)
    model = sharp(DiT())
    text, image = inputs()
    see = AttentionMagnets(text=range(5), image=range(5, 17), grid=(3, 4), first=2)
    with torch.no_grad(), capture(model, see):
        model(text, image)
    with torch.no_grad():
        tables = dense(model, text, image)
    assert see.blocks == 2 and len(see.columns) == 4
    words = [("red", [1]), ("minivan", [2, 4])]
    found = see.heatmap(words)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                row = (tables[2, b, 5 + 4 * y + x] + tables[3, b, 5 + 4 * y + x]) / 2
                wanted = (row[1] + (row[2] + row[4])) / 2
                assert found[b, y, x].item() == pytest.approx(wanted.item(), rel=1e-5)  # float32
    for block, column in enumerate(see.columns):
        torch.testing.assert_close(column, tables[block, :, 5:, :5].mean(1).float())
    # What is kept, what is dropped and the image make up a row.
    rest = tables[2:, :, 5:, 5:].sum(-1).mean(0)
    torch.testing.assert_close(see.table.sum(-1) + rest.float(), torch.ones(2, 12))
    less = see.heatmap(words, drop=torch.arange(5) == 4)
    torch.testing.assert_close(less, (see.table[..., 1] + see.table[..., 2]).view(2, 3, 4) / 2)


def test_magnets_take_from_all_alike():
    """In the first block, magnets leave the ratios of the words at each place of the image as they were."""
    torch.manual_seed(0)
    model = sharp(DiT(blocks=1))
    text, image = inputs()
    magnets = torch.randn(2, 3, 12).double() * 2
    maps = []
    for words in (text, torch.cat([text, magnets], dim=1)):
        m = words.shape[1]
        see = AttentionMagnets(text=range(m), image=range(m, m + 12), grid=(3, 4))
        with torch.no_grad(), capture(model, see):
            model(words, image)
        maps.append(see.table[..., :5])
    assert (maps[1] < maps[0]).all()
    # Ratios hold head by head; so with one head they hold in the mean.
    model.blocks[0].heads = 1
    for i, words in enumerate((text, torch.cat([text, magnets], dim=1))):
        m = words.shape[1]
        see = AttentionMagnets(text=range(m), image=range(m, m + 12), grid=(3, 4))
        with torch.no_grad(), capture(model, see):
            model(words, image)
        maps[i] = see.table[..., :5] / see.table[..., :1]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=0)  # float32


def test_video_with_text_seen_by_cross_attention():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = (nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))

        def forward(self, image, text):
            image = image + self.own(image, image, image)[0]
            return image + self.cross(image, text, text)[0]

    torch.manual_seed(0)
    model = Block().double().eval()
    text, image = inputs(words=4, grid=(6, 4))
    see = AttentionMagnets(text=range(4), image=range(24), grid=(2, 3, 4))
    with torch.no_grad(), capture(model, see):
        model(image, text)
        inside = image + model.own(image, image, image)[0]
        _, wanted = model.cross(inside, text, text)
    assert see.blocks == 2  # the second call is that of the line above
    torch.testing.assert_close(see.table, wanted.float())
    found = see.heatmap([("cat", [2])])
    assert found.shape == (2, 2, 3, 4)
    frame, y, x = heatmap_peak(found)[1].tolist()
    assert found[1, frame, y, x] == found[1].max()


def test_global_sinks():
    m = 20
    even = torch.full((2, m), 0.01)
    sunk, other = even.clone(), even.clone()
    sunk[0, 3] = 0.5  # of the first row alone
    other[1, 7] = 0.4
    shallow = other  # does not count: the upper half of the blocks alone
    found = find_global_sinks([shallow, shallow, sunk, even])
    assert found.nonzero().tolist() == [[0, 3]]  # in one of two
    assert not find_global_sinks([shallow, shallow, shallow, sunk, even, even]).any()  # in one of three
    assert find_global_sinks([sunk]).nonzero().tolist() == [[0, 3]]
    mild = torch.linspace(0.01, 0.02, m)
    mild[0] = mild.mean() + 2.9 * mild.std(correction=0)
    assert not find_global_sinks([mild]).any()


def test_words():
    expression = "the left-most cat on a bench"
    prompt = with_magnets(expression, colour="green")
    assert prompt == "the left-most cat on a bench a the of with in on and . green"
    # Tokens with the space before them, "bench" in two pieces, and a special token at either end.
    pieces = ["the", " left", "-", "most", " cat", " on", " a", " ben", "ch", " a", " the", " of"]
    offsets, at = [(0, 0)], 0
    for piece in pieces:
        offsets.append((at, at + len(piece)))
        at += len(piece)
    assert content_words(expression, [*offsets, (0, 0)]) == [
        ("left-most", [2, 3, 4]),
        ("cat", [5]),
        ("bench", [8, 9]),
    ]
    assert content_words(expression, offsets[:6]) == [("left-most", [2, 3, 4]), ("cat", [5])]  # cut


def test_no_table_of_the_image():
    torch.manual_seed(0)
    model = DiT(blocks=1, dim=8, heads=1).eval()
    n, m = 8192, 8
    see = AttentionMagnets(text=range(m), image=range(m, m + n), grid=(64, 128))
    with torch.no_grad(), largest() as seen, capture(model, see):
        model(torch.randn(1, m, 8), torch.randn(1, n, 8))
    assert seen.most <= 1 << 22  # pieces; a table would have 2^26 entries
    assert see.heatmap([("x", [0])]).shape == (1, 64, 128)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="image has 5 tokens, must have the 12 of the grid"):
        AttentionMagnets(text=range(4), image=range(4, 9), grid=(3, 4))
    with pytest.raises(ValueError, match="must be ranges of step 1"):
        AttentionMagnets(text=range(0), image=range(12), grid=(3, 4))
    see = AttentionMagnets(text=range(2), image=range(2, 6), grid=(2, 2), first=1)
    with pytest.raises(ValueError, match="no block of 6 queries and 6 keys from number 1 on was seen"):
        _ = see.table
    model = DiT(blocks=2).eval()
    with torch.no_grad(), capture(model, see):
        model(torch.randn(1, 2, 12), torch.randn(1, 4, 12))
    with pytest.raises(ValueError, match="words is empty"):
        see.heatmap([])
    with pytest.raises(ValueError, match="all of 'cat' would be dropped; append magnets"):
        see.heatmap([("cat", [1])], drop=torch.tensor([False, True]))
    with pytest.raises(ValueError, match="columns is empty"):
        find_global_sinks([])
