from __future__ import annotations

import math

import pytest
import torch
from tests.literal import assert_same_with_gradients, depthwise, layer_norm, scatter, silu
from torch import Tensor
from torch.testing import assert_close

from heedful import authors
from heedful.mixers.scan.a2mamba import (
    A2MambaGlobalAttention,
    AttentionAugmentedSSM,
    MultiScaleAttentionAugmentedSSM,
)
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.models.count import multiply_adds
from heedful.ops.attention import attention
from heedful.ops.counting import counted
from heedful.ops.neighborhood import NeighborhoodMap
from heedful.patterns.neighborhood import Neighborhood


def build(kind: type = MultiScaleAttentionAugmentedSSM, **arguments):
    torch.manual_seed(0)
    mixer = kind(16, **{"heads": 4, "window": 3, **arguments}, dtype=torch.float64)
    scatter(mixer)
    with torch.no_grad():
        mixer.gate_norm.running_mean.normal_()
        mixer.gate_norm.running_var.uniform_(0.5, 2)
    return mixer.eval()


def keys(i: int, length: int, window: int, dilation: int) -> list[tuple[int, int]]:
    """Keys of place i and how many steps away they are; windows move inward at the ends."""
    group, place = i % dilation, i // dilation
    many = math.ceil((length - group) / dilation)
    start = min(max(place - window // 2, 0), many - window)
    return [((start + t) * dilation + group, start + t - place) for t in range(window)]


def turned(x: Tensor) -> Tensor:
    """Neighbouring channels of (height, width, d) as pairs; the first half turns with the row."""
    height, width, d = x.shape
    rows = []
    for i in range(height):
        for j in range(width):
            y = []
            for p in range(d // 2):
                step = p % (d // 4) / max(1, d // 4 - 1)
                angle = torch.tensor((i if p < d // 4 else j) * 10000.0**-step, dtype=torch.float64)
                a, b = x[i, j, 2 * p], x[i, j, 2 * p + 1]
                y += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
            rows.append(torch.stack(y))
    return torch.stack(rows).view(height, width, d)


def weights(q: Tensor, k: Tensor, table: Tensor, window: list[int], dilation: list[int]) -> list:
    """For every token the list of (row, column, weight)."""
    height, width, d = q.shape
    half = table.shape[0] // 2
    found = []
    for i in range(height):
        for j in range(width):
            near = [
                (a, b, q[i, j] @ k[a, b] / d**0.5 + table[half + da, half + db])
                for a, da in keys(i, height, window[0], dilation[0])
                for b, db in keys(j, width, window[1], dilation[1])
            ]
            total = torch.stack([s for _, _, s in near]).exp().sum()
            found.append([(a, b, s.exp() / total) for a, b, s in near])
    return found


def average(found: list, v: Tensor) -> Tensor:
    rows = [sum(w * v[a, b] for a, b, w in near) for near in found]
    return torch.stack(rows).view_as(v)


def literal(x: Tensor, m: MultiScaleAttentionAugmentedSSM) -> Tensor:
    """One map (c, height, width)."""
    _, height, width = x.shape
    n, d = m.heads, m.dim // m.heads
    window = [min(m.window, s) for s in (height, width)]
    dilation = [max(1, min(s // m.window, m.window)) for s in (height, width)]

    def pointwise(conv):
        return torch.einsum("dc,cyx->dyx", conv.weight.flatten(1), x) + conv.bias[:, None, None]

    norm = m.gate_norm
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    gate = pointwise(m.gate).permute(1, 2, 0)
    gate = silu((gate - norm.running_mean) * factor + norm.bias)
    q, k, v = pointwise(m.qkv).chunk(3)
    local = depthwise(v, m.lepe).permute(1, 2, 0)
    q, k, v = (t.unflatten(0, (n, d)).permute(0, 2, 3, 1) for t in (q, k, v))
    q, k = (torch.stack([turned(head) for head in t]) for t in (q, k))
    first, second, values = [], [], []
    for h in range(n // 2):
        first.append(weights(q[h], k[h], m.bias[h], window, [1, 1]))
        values.append(average(first[-1], v[h]))
    for h in range(n // 2):
        other = n // 2 + h
        second.append(weights(q[other], k[other], m.bias[h], window, dilation))
        values.append(average(second[-1], values[h] + v[other]))
    values = torch.stack(values)

    if isinstance(m, A2MambaGlobalAttention):
        y = []
        for h in range(n):
            logits = q[h].flatten(0, 1) @ k[h].flatten(0, 1).T / d**0.5 + m.global_bias[0, h]
            y.append(logits.exp() / logits.exp().sum(1, keepdim=True) @ values[h].flatten(0, 1))
        y = torch.cat(y, -1).view(height, width, -1)
    else:
        y = scanned(values.permute(0, 3, 1, 2).flatten(0, 1), m.ssm, [*first, *second])
    y = layer_norm(layer_norm(y, m.norm).add(local) * gate, m.out_norm)
    return (y @ m.out.weight.T + m.out.bias).permute(2, 0, 1)


def scanned(x: Tensor, m: AttentionAugmentedSSM, maps: list | None) -> Tensor:
    """The state space over (c, height, width), giving (height, width, c)."""
    c, height, width = x.shape
    ssm, d = m.ssm, c // m.heads
    u = silu(depthwise(x, m.conv)).flatten(1).T
    h, states, reads = torch.zeros(c, dtype=torch.float64), [], []
    for u_t in u:
        given = ssm.read[0] @ u_t
        delta = torch.log1p(torch.exp(ssm.step[0] @ given[: ssm.rank] + ssm.step_bias[0]))
        h = torch.exp(-delta * torch.exp(ssm.log_rate[0, :, 0])) * h + delta * given[ssm.rank] * u_t
        states.append(h)
        reads.append(given[ssm.rank + 1])
    s = torch.stack(states).view(height, width, m.heads, d)
    if maps is not None:
        found = torch.stack([average(near, s[:, :, i]) for i, near in enumerate(maps)])
        s = torch.einsum("gh,hyxd->yxgd", m.fuse.weight, found) + m.fuse.bias[:, None]
    y = s.flatten(2) * torch.stack(reads).view(height, width, 1)
    return y + ssm.skip[0] * u.view(height, width, c)


@pytest.mark.parametrize("size", [(6, 7), (2, 5)])  # a dilation of 2; a map smaller than the window
def test_equals_the_steps_token_by_token(size):
    m = build()
    x = torch.randn(1, 16, *size, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), literal(x[0], m)[None], [x, *m.parameters()])


def test_global_form_equals_the_steps():
    m = build(A2MambaGlobalAttention, size=(4, 3))
    x = torch.randn(1, 16, 4, 3, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), literal(x[0], m)[None], [x, *m.parameters()])


def test_global_form_on_another_map_resizes_its_table():
    m = build(A2MambaGlobalAttention, size=(4, 4))
    x = torch.randn(2, 16, 6, 3, dtype=torch.float64)
    other = build(A2MambaGlobalAttention, size=(6, 3))
    state = {n: v for n, v in m.state_dict().items() if n != "global_bias"}
    table = torch.nn.functional.interpolate(m.global_bias, size=(18, 18), mode="bicubic")
    other.load_state_dict({**state, "global_bias": table})
    assert_close(m(x), other(x))


def test_scan_without_attention():
    m = AttentionAugmentedSSM(16, heads=4, dtype=torch.float64)
    scatter(m)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for n, p in m.named_parameters() if not n.startswith("fuse"))]
    assert_same_with_gradients(m(x), scanned(x[0], m, None).permute(2, 0, 1)[None], leaves)


def test_uniform_weights_and_no_mixing_of_heads_filter_the_states_by_a_box():
    m = AttentionAugmentedSSM(8, heads=2, dtype=torch.float64)
    scatter(m)
    with torch.no_grad():
        m.fuse.weight.copy_(torch.eye(2))
        m.fuse.bias.zero_()
        m.ssm.skip.zero_()
    near = NeighborhoodMap((5, 6), (3, 3))
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    uniform = torch.full((1, 1, 30, 9), 1 / 9, dtype=torch.float64)
    h, read = m.ssm.hidden(silu(m.conv(x)).flatten(2)[:, None])
    box = torch.nn.functional.avg_pool2d(h[:, 0].view(1, 8, 5, 6), 3, stride=1)  # the inner tokens
    y = m(x, [(near, uniform), (near, uniform)])
    assert_close(y[..., 1:-1, 1:-1], box * read[:, 0].view(1, 1, 5, 6)[..., 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("size", "window", "dilation"),
    [
        ((7, 8), (3, 5), (1, 1)),
        ((7, 8), (3, 2), (2, 3)),
        ((13, 9), (3, 3), (1, 3)),  # several tiles an axis, the last ones cut
        ((15, 7), (4, 7), (2, 1)),
    ],
)
def test_neighborhood_with_weights_equals_attention_with_the_pattern(size, window, dilation):
    near = NeighborhoodMap(size, window, dilation)
    q, k, v = (
        torch.randn(2, 3, size[0] * size[1], 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    y = near.average((near.logits(q, k) / 2).softmax(-1), v)
    want = attention(q, k, v, pattern=Neighborhood(size, window, 1, dilation))
    assert_close(y, want)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g))


def test_neighborhoods_are_counted_as_their_formulas_say():
    """n k d for the logits and as many for the average, though tiles compute more."""
    near = NeighborhoodMap((12, 12), (3, 3))

    class Both(torch.nn.Module):
        def forward(self, x):
            return near.average(near.logits(x, x), x)

    x = torch.randn(1, 1, 144, 8, dtype=torch.float64)
    assert multiply_adds(Both(), x) == 2 * 144 * 9 * 8
    with counted():
        want = near.average(near.logits(x, x), x)
    assert_close(Both()(x), want)


def test_the_authors_names():
    m = build()
    ssm = m.ssm.ssm
    theirs = {
        "qkv.weight": m.qkv.weight,
        "qkv.bias": m.qkv.bias,
        **{f"gate.0.{n}": v for n, v in m.gate.state_dict().items()},
        **{f"gate.1.{n}": v for n, v in m.gate_norm.state_dict().items()},
        **{f"lepe.{n}": v for n, v in m.lepe.state_dict().items()},
        **{f"norm.{n}": v for n, v in m.norm.state_dict().items()},
        **{f"proj.0.{n}": v for n, v in m.out_norm.state_dict().items()},
        "proj.1.weight": m.out.weight[:, :, None, None],
        "proj.1.bias": m.out.bias,
        "ssm.x_proj_weight": ssm.read[0],
        "ssm.dt_projs_weight": ssm.step[0],
        "ssm.dt_projs_bias": ssm.step_bias[0],
        "ssm.A_logs": ssm.log_rate[0],
        "ssm.Ds": ssm.skip[0],
        **{f"ssm.conv2d.{n}": v for n, v in m.ssm.conv.state_dict().items()},
        "ssm.state_fusion.weight": m.ssm.fuse.weight[:, :, None, None],
        "ssm.state_fusion.bias": m.ssm.fuse.bias,
        "rpb.0": m.bias,
        "rpb.1": m.bias,
    }
    other = MultiScaleAttentionAugmentedSSM(16, heads=4, window=3, dtype=torch.float64).eval()
    x = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    assert torch.equal(authors.load(other, theirs)(x), m(x))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 1, must be even"):
        MultiScaleAttentionAugmentedSSM(16, heads=1)
    with pytest.raises(ValueError, match=r"heads is 8, must be even and leave a multiple of 4 .*, not 2"):
        MultiScaleAttentionAugmentedSSM(16, heads=8)
    with pytest.raises(ValueError, match="window is 4, must be odd"):
        MultiScaleAttentionAugmentedSSM(16, heads=2, window=4)
    with pytest.raises(ValueError, match=r"size\[1\] is 0"):
        A2MambaGlobalAttention(16, heads=2, size=(3, 0))
    with pytest.raises(ValueError, match="state_dim is 2, must be 1"):
        SelectiveSSM(4, routes=1, state_dim=2).hidden(torch.zeros(1, 1, 4, 3))
