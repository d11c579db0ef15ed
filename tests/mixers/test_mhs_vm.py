from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, depthwise, layer_norm, s6, scatter, silu
from torch import Tensor
from torch.testing import assert_close

from heedful import authors
from heedful.mixers.scan.mhs_vm import MultiHeadScan2d, MultiHeadScanGate, fuse_routes


def build(kind: type, **arguments):
    torch.manual_seed(0)
    mixer = kind(11, **{"heads": 3, "state_dim": 2, **arguments}, dtype=torch.float64)
    scatter(mixer)
    return mixer


def places(pattern: int, height: int, width: int) -> list[list[tuple[int, int]]]:
    """The two base routes of a head, as places (i, j)."""
    cells = [(i, j) for i in range(height) for j in range(width)]
    if pattern == 0:  # rows, every second one backwards, and columns likewise
        rows = sorted(cells, key=lambda c: (c[0], -c[1] if c[0] % 2 else c[1]))
        return [rows, sorted(cells, key=lambda c: (c[1], -c[0] if c[1] % 2 else c[0]))]
    if pattern == 1:  # diagonals, those of even number upwards
        first = sorted(cells, key=lambda c: (c[0] + c[1], c[0] if (c[0] + c[1]) % 2 else -c[0]))
        return [first, [(i, width - 1 - j) for i, j in first]]
    if pattern == 2:  # clockwise: right, down, left, up, turning where the way is taken
        taken, place, turn = [(0, 0)], (0, 0), 0
        while len(taken) < len(cells):
            di, dj = [(0, 1), (1, 0), (0, -1), (-1, 0)][turn % 4]
            step = (place[0] + di, place[1] + dj)
            if step in cells and step not in taken:
                place = step
                taken.append(step)
            else:
                turn += 1
        return [taken, [(height - 1 - i, j) for i, j in taken]]
    return [cells, sorted(cells, key=lambda c: (c[1], c[0]))]


def literal(x: Tensor, m: MultiHeadScan2d) -> Tensor:
    """One map (c, height, width)."""
    _, height, width = x.shape
    d = m.dim // m.heads
    heads = []
    for h in range(m.heads):
        u = torch.einsum("dc,cyx->yxd", m.enter.weight[h * d : (h + 1) * d], x)
        found = []
        base = places(h, height, width)
        for r, route in enumerate([base[0], base[0][::-1], base[1], base[1][::-1]]):
            y = s6(torch.stack([u[i, j] for i, j in route]), m.ssm, 4 * h + r)
            at = {place: t for t, place in enumerate(route)}
            found.append(
                torch.stack([torch.stack([y[at[i, j]] for j in range(width)]) for i in range(height)])
            )
        mean = sum(found) / 4
        std = (sum((y - mean) ** 2 for y in found) / 3).sqrt()
        least = torch.stack(found).amin(0)
        cv = std / (sum(y - least for y in found) / 4 + 1e-5)
        heads.append(sum(found) * torch.clamp(cv - m.threshold, min=0))
    return (layer_norm(torch.cat(heads, -1), m.norm) @ m.out.weight.T).permute(2, 0, 1)


@pytest.mark.parametrize(("heads", "threshold", "size"), [(3, 0.0, (2, 4)), (4, 0.6, (4, 3))])
def test_equals_the_steps_token_by_token(heads, threshold, size):
    m = build(MultiHeadScan2d, heads=heads, threshold=threshold)
    x = torch.randn(2, 11, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([literal(row, m) for row in x])
    assert_same_with_gradients(m(x), expected, [x, *m.parameters()])


def test_gate_around_the_scan():
    m = build(MultiHeadScanGate)
    x = torch.randn(2, 11, 3, 4, dtype=torch.float64, requires_grad=True)
    u, z = torch.einsum("dc,bcyx->bdyx", m.enter.weight, x).split(11, dim=1)
    y = torch.stack([literal(silu(depthwise(row, m.conv)), m.scan) for row in u])
    expected = layer_norm(y.movedim(1, -1), m.norm).movedim(-1, 1) * silu(z)
    assert_same_with_gradients(m(x), expected, [x, *m.parameters()])


def test_where_all_routes_agree_nothing_is_left():
    y = torch.randn(1, 2, 1, 3, 5, dtype=torch.float64).expand(-1, -1, 4, -1, -1).clone().requires_grad_()
    fused = fuse_routes(y)
    assert_close(fused, torch.zeros_like(fused))
    (grad,) = torch.autograd.grad(fused.sum(), y)
    assert grad.isfinite().all()


def test_a_map_of_zeros_has_finite_gradients():
    m = build(MultiHeadScan2d)
    x = torch.zeros(1, 11, 3, 3, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(m(x).sum(), [x, *m.parameters()], materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)


def published_unet(heads: int) -> int:
    """Parameters of the authors' network for 256 x 256 and 1 class, all but the mixers counted by hand."""

    def block(c: int) -> int:
        mixer = MultiHeadScanGate(c, heads=heads, device="meta")
        return sum(p.numel() for p in mixer.parameters()) + 2 * c  # and a norm

    dims = (96, 192, 384, 768)
    total = 3 * 16 * 96 + 96 + 2 * 96  # patches and their norm
    total += sum(2 * block(c) for c in dims)
    total += sum(8 * c + 4 * c * 2 * c for c in dims[:3])  # merging: norm and projection
    total += sum(n * block(c) for n, c in zip((2, 2, 2, 1), dims[::-1], strict=True))
    total += sum(2 * c * c + c for c in dims[:0:-1])  # expanding: projection to 2 c, norm of c / 2
    return total + 96 * 384 + 2 * 24 + 24 + 1  # four times as large, norm, 1 x 1 convolution


@pytest.mark.parametrize(("heads", "published"), [(3, 17_386_153), (4, 17_257_129)])
def test_parameters_of_the_published_network(heads, published):
    assert published_unet(heads) == published


def test_the_authors_names():
    m = build(MultiHeadScanGate, heads=4)
    theirs = {
        "in_proj.weight": m.enter.weight,
        "conv2d.weight": m.conv.weight,
        "conv2d.bias": m.conv.bias,
        "out_norm.weight": m.norm.weight,
        "out_norm.bias": m.norm.bias,
        "mhs.x_ssproj_W": m.scan.enter.weight,
        "mhs.x_ssproj.weight": m.scan.enter.weight,
        "mhs.cat_norm.weight": m.scan.norm.weight,
        "mhs.cat_norm.bias": m.scan.norm.bias,
        "mhs.y_proj.weight": m.scan.out.weight,
    }
    for h, letter in enumerate("CXSZ"):
        own, ssm = slice(4 * h, 4 * h + 4), m.scan.ssm
        for name in ("mambaeng", "scanning.seq2seq_engine"):
            prefix = f"mhs.scanhead_{letter}.{name}"
            theirs |= {
                f"{prefix}.x_proj_weight": ssm.read[own],
                f"{prefix}.dt_projs_weight": ssm.step[own],
                f"{prefix}.dt_projs_bias": ssm.step_bias[own],
                f"{prefix}.A_logs": ssm.log_rate[own].flatten(0, 1),
                f"{prefix}.Ds": ssm.skip[own].flatten(),
            }
    other = MultiHeadScanGate(11, heads=4, state_dim=2, dtype=torch.float64)
    x = torch.randn(1, 11, 4, 3, dtype=torch.float64)
    assert torch.equal(authors.load(other, theirs)(x), m(x))


@pytest.mark.parametrize("kind", [MultiHeadScan2d, MultiHeadScanGate])
def test_kept_routes_outlive_an_export(kind):
    m, x = build(kind).eval(), torch.randn(1, 11, 7, 3, dtype=torch.float64)
    program = torch.export.export(m, (x,), strict=False)
    assert_close(program.module()(x), m(x))


@pytest.mark.door
@pytest.mark.parametrize("kind", [MultiHeadScan2d, MultiHeadScanGate])
def test_errors(kind):
    with pytest.raises(ValueError, match="heads is 2, must be one of 3, 4"):
        kind(12, heads=2)
    with pytest.raises(ValueError, match="heads is 4, must be at most dim, which is 3"):
        kind(3, heads=4)
    with pytest.raises(ValueError, match="state_dim is 0"):
        kind(12, state_dim=0)
