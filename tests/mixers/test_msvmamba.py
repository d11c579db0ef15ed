from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, depthwise, layer_norm, s6, scatter, silu
from torch import Tensor

from heedful import authors
from heedful.mixers.scan.msvmamba import MultiScaleScan2d


def build(**arguments) -> MultiScaleScan2d:
    torch.manual_seed(0)
    mixer = MultiScaleScan2d(9, **{"state_dim": 2, **arguments}, dtype=torch.float64)
    scatter(mixer)
    return mixer


def resizer(old: int, new: int) -> Tensor:
    """The matrix (new, old) of bilinear resizing along one axis, half-pixel centres."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = max(0.0, (i + 0.5) * old / new - 0.5)
        low = min(int(at), old - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, old - 1)] += at - low
    return matrix


def literal(x: Tensor, m: MultiScaleScan2d) -> Tensor:
    """One map (c, height, width)."""
    _, height, width = x.shape
    u, z = torch.einsum("dc,cyx->dyx", m.enter.weight, x).chunk(2)
    full = silu(depthwise(u, m.conv))
    y = layer_norm(s6(full.flatten(1).T, m.ssm, 0), m.norm).T.view_as(full)

    low = silu(depthwise(u, m.low_conv))
    h, w = low.shape[1:]
    assert (h, w) == (-(-height // 2), -(-width // 2))
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    ways = [rows[::-1], columns, columns[::-1]]
    if m.reset:
        scanned = torch.cat([s6(torch.stack([low[:, i, j] for i, j in way]), m.low_ssm, 0) for way in ways])
    else:
        scanned = s6(torch.stack([low[:, i, j] for way in ways for i, j in way]), m.low_ssm, 0)
    found = [[0.0] * w for _ in range(h)]
    for (i, j), value in zip([place for way in ways for place in way], scanned, strict=True):
        found[i][j] = found[i][j] + layer_norm(value, m.norm)
    small = torch.stack([torch.stack(row) for row in found])
    y = y + torch.einsum("ip,jq,pqd->dij", resizer(h, height), resizer(w, width), small)

    gate = torch.sigmoid(m.excite.weight @ torch.relu(m.squeeze.weight @ y.mean((1, 2))))
    return torch.einsum("cd,dyx->cyx", m.out.weight, y * gate[:, None, None] * silu(z))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 5)])
def test_equals_the_steps_token_by_token(size, reset):
    m = build(reset=reset)
    x = torch.randn(2, 9, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([literal(row, m) for row in x])
    assert_same_with_gradients(m(x), expected, [x, *m.parameters()])


@pytest.mark.parametrize(
    ("width", "depths", "published"),
    [(48, (1, 2, 5, 2), 6_864_136), (64, (1, 2, 5, 2), 11_879_272), (96, (1, 2, 9, 2), 33_046_312)],
)
def test_parameters_of_the_published_networks(width, depths, published):
    dims = [width, 2 * width, 4 * width, 8 * width]
    total = 3 * 16 * width + width + 2 * width  # patches and their norm
    for depth, c in zip(depths, dims, strict=True):
        mixer = sum(p.numel() for p in MultiScaleScan2d(c, device="meta").parameters())
        ffn = (c + 1) * 2 * c + 10 * 2 * c + (2 * c + 1) * c
        total += depth * (mixer + ffn + 4 * c)
    total += sum(8 * c + 4 * c * 2 * c for c in dims[:3])  # merging of patches
    assert total + 2 * dims[3] + (dims[3] + 1) * 1000 == published


def test_the_authors_names():
    m = build()
    theirs = {
        "in_proj.weight": m.enter.weight,
        "conv2d.weight": m.conv.weight,
        "conv2d.bias": m.conv.bias,
        "conv2d_b1.weight": m.low_conv.weight,
        "conv2d_b1.bias": m.low_conv.bias,
        "x_proj_weight": torch.cat([m.low_ssm.read, m.ssm.read]),
        "dt_projs_weight": torch.cat([m.low_ssm.step, m.ssm.step]),
        "dt_projs_bias": torch.cat([m.low_ssm.step_bias, m.ssm.step_bias]),
        "A_logs": torch.cat([m.low_ssm.log_rate[0], m.ssm.log_rate[0]]),
        "Ds": torch.cat([m.low_ssm.skip[0], m.ssm.skip[0]]),
        "out_norm.weight": m.norm.weight,
        "out_norm.bias": m.norm.bias,
        "se.fc.0.weight": m.squeeze.weight,
        "se.fc.2.weight": m.excite.weight,
        "out_proj.weight": m.out.weight,
    }
    other = MultiScaleScan2d(9, state_dim=2, dtype=torch.float64)
    x = torch.randn(1, 9, 4, 3, dtype=torch.float64)
    assert torch.equal(authors.load(other, theirs)(x), m(x))


def test_what_a_direction_leaves_enters_the_next_unless_reset():
    x = torch.randn(1, 9, 4, 6, dtype=torch.float64)
    carried, reset = build(), build(reset=True)
    assert not torch.allclose(carried(x), reset(x))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"expand \* dim is 6, must be at least 8"):
        MultiScaleScan2d(3)
    with pytest.raises(ValueError, match="expand is 0"):
        MultiScaleScan2d(8, expand=0)
