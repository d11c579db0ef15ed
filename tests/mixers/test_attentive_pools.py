from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.abmilp import ABMILP
from heedful.mixers.pooling.aim_pool import AIMPool
from heedful.mixers.pooling.cae_pool import CAEPool
from heedful.mixers.pooling.cait_pool import CaiTPool
from heedful.mixers.pooling.coca_pool import CoCaPool
from heedful.mixers.pooling.dolg_pool import DOLGPool
from heedful.mixers.pooling.esimpool import ESimPool
from heedful.mixers.pooling.siglip_pool import SigLIPPool
from heedful.mixers.pooling.simpool import SimPool
from heedful.mixers.pooling.vjepa_pool import VJEPAPool


def norm(x: Tensor, layer: nn.LayerNorm, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def line(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T if layer.bias is None else x @ layer.weight.T + layer.bias


def ffn(x: Tensor, mlp: nn.Module) -> Tensor:
    h = line(x, mlp.fc1)
    return line(h * (1 + torch.erf(h / math.sqrt(2))) / 2, mlp.fc2)


def answer(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One query (c) over tokens (n, c), head by head and token by token."""
    width = len(q) // heads
    parts = []
    for h in range(heads):
        s = slice(h * width, (h + 1) * width)
        weights = [((q[s] * token[s]).sum() / math.sqrt(width)).exp() for token in k]
        parts.append(sum(w * token[s] for w, token in zip(weights, v, strict=True)) / sum(weights))
    return torch.cat(parts)


def simpool(p: SimPool, x: Tensor) -> Tensor:
    v = norm(x, p.norm_patches, 1e-6)
    return answer(line(x.mean(0), p.wq), line(v, p.wk), v, p.heads)


def esimpool(p: ESimPool, x: Tensor) -> Tensor:
    v = norm(x, p.norm_patches, 1e-6)
    return answer(x.mean(0), v, v, p.heads)


def aim(p: AIMPool, x: Tensor) -> Tensor:
    z = (x - p.bn.running_mean) / (p.bn.running_var + 1e-6).sqrt()
    answers = [answer(q, line(z, p.k), line(z, p.v), p.heads) for q in p.cls_token[0]]
    return sum(answers) / len(answers)


def cae(p: CAEPool, x: Tensor) -> Tensor:
    q = line(norm(p.query_token[0, 0], p.norm1_q, 1e-5), p.q)
    k, v = line(norm(x, p.norm1_k, 1e-5), p.k), line(norm(x, p.norm1_v, 1e-5), p.v)
    return line(answer(q, k, v, p.heads), p.proj)


def vjepa(p: VJEPAPool, x: Tensor) -> Tensor:
    query, kv = p.query_tokens[0, 0], line(norm(x, p.norm1, 1e-5), p.kv)
    a = query + line(answer(line(query, p.q), kv[:, : p.dim], kv[:, p.dim :], p.heads), p.proj)
    return a + ffn(norm(a, p.norm2, 1e-5), p.mlp)


def siglip(p: SigLIPPool, x: Tensor) -> Tensor:
    kv = line(x, p.kv)
    a = line(answer(line(p.latent[0, 0], p.q), kv[:, : p.dim], kv[:, p.dim :], p.heads), p.proj)
    return a + ffn(a, p.mlp)


def cait(p: CaiTPool, x: Tensor) -> Tensor:
    cls = p.cls_token[0, 0]
    u = norm(torch.cat((cls[None], x)), p.norm1, 1e-6)
    a = cls + p.gamma_1 * line(answer(line(u[0], p.q), line(u, p.k), line(u, p.v), p.heads), p.proj)
    return norm(a + p.gamma_2 * ffn(norm(a, p.norm2, 1e-6), p.mlp), p.norm, 1e-5)


def abmilp(p: ABMILP, x: Tensor) -> Tensor:
    if p.self_attention:
        q, k, v = (line(x, p.qkv)[:, i * p.dim : (i + 1) * p.dim] for i in range(3))
        x = torch.stack([line(answer(row, k, v, 1), p.proj) for row in q])
    first, _, last = p.attention_predictor
    weights = [line(line(token, first).tanh(), last).exp() for token in x]
    return sum(w * token for w, token in zip(weights, x, strict=True)) / sum(weights)


def coca(p: CoCaPool, x: Tensor) -> Tensor:
    q, kv = line(norm(p.query_token[0, 0], p.norm, 1e-5), p.q), line(x, p.kv)
    width = kv.shape[1] // 2
    parts = [answer(own, kv[:, :width], kv[:, width:], 1) for own in q.split(width)]
    return line(torch.cat(parts), p.proj)


def dolg(p: DOLGPool, x: Tensor) -> Tensor:
    z = (line(x, p.conv1) - p.bn.running_mean) / (p.bn.running_var + 1e-5).sqrt() * p.bn.weight + p.bn.bias
    weights = [(1 + line(token.clamp(min=0), p.conv2).exp()).log() for token in z]
    return sum(w * token / token.norm() for w, token in zip(weights, z, strict=True)) / len(x)


Case = tuple[Callable[[], Mixer], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "simpool": (lambda: SimPool(8), simpool),
    "simpool-heads": (lambda: SimPool(8, heads=2), simpool),
    "esimpool": (lambda: ESimPool(8, heads=4), esimpool),
    "aim": (lambda: AIMPool(8, heads=2), aim),
    "aim-queries": (lambda: AIMPool(8, heads=2, queries=3), aim),
    "cae": (lambda: CAEPool(8, heads=2), cae),
    "vjepa": (lambda: VJEPAPool(8, heads=2), vjepa),
    "siglip": (lambda: SigLIPPool(8, heads=2), siglip),
    "cait": (lambda: CaiTPool(8, heads=2), cait),
    "coca": (lambda: CoCaPool(8, heads=3, head_dim=5), coca),
    "dolg": (lambda: DOLGPool(8, out=6), dolg),
    "abmilp": (lambda: ABMILP(8), abmilp),
    "abmilp-without-attention": (lambda: ABMILP(8, self_attention=False), abmilp),
}


def drawn(make: Callable[[], Mixer]) -> Mixer:
    """The pool in eval mode and float64, its parameters and buffers large enough to matter."""
    pool = make().double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in pool.state_dict().items():
            if p.is_floating_point():
                value = 0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(value.abs() + 0.3 if name.endswith("running_var") else value)
    return pool


def tokens(n: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_equals_transcription_with_gradients(case: str) -> None:
    make, literal = CASES[case]
    pool, x = drawn(make), tokens().requires_grad_()
    theirs = torch.stack([literal(pool, row) for row in x])
    torch.testing.assert_close(pool(x), theirs)
    up, of = torch.randn_like(theirs), (x, *pool.parameters())
    for a, b in zip(torch.autograd.grad(pool(x), of, up), torch.autograd.grad(theirs, of, up), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_mask_leaves_tokens_out(case: str) -> None:
    make, literal = CASES[case]
    pool, x = drawn(make), tokens(7)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7]).bool()
    spoilt = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    y = pool(spoilt, mask=mask)
    torch.testing.assert_close(y[0], literal(pool, x[0, [0, 1, 3]]))
    assert y[1].isfinite().all()
    y.sum().backward()
    assert spoilt.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize("case", ["simpool", "esimpool", "aim", "coca", "dolg", "abmilp"])
def test_row_without_tokens_gives_zeros(case: str) -> None:
    pool = drawn(CASES[case][0])
    assert pool(tokens(3), mask=torch.zeros(2, 3).bool()).eq(0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_aim_normalises_over_the_visible_tokens_of_the_batch(masked: bool) -> None:
    pool, x = drawn(CASES["aim"][0]).train(), tokens(6)
    mask = (
        torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]).bool() if masked else torch.ones(2, 6).bool()
    )
    before = pool.bn.running_mean.clone()
    y = pool(x, mask=mask if masked else None)
    seen = torch.cat([row[m] for row, m in zip(x, mask, strict=True)])
    mean, var = seen.mean(0), seen.var(0, correction=0)
    torch.testing.assert_close(pool.bn.running_mean, 0.9 * before + 0.1 * mean)
    for row, m, ours in zip(x, mask, y, strict=True):
        z = (row[m] - mean) / (var + 1e-6).sqrt()
        torch.testing.assert_close(ours, answer(pool.cls_token[0, 0], line(z, pool.k), line(z, pool.v), 2))


def test_aim_without_statistics_keeps_the_running_ones() -> None:
    pool = drawn(CASES["aim"][0]).train()
    before = pool.bn.running_mean.clone()
    y = pool(tokens(1)[:1])
    assert torch.equal(pool.bn.running_mean, before)
    torch.testing.assert_close(y, pool.eval()(tokens(1)[:1]))


def test_dolg_normalises_over_the_visible_tokens_of_the_batch() -> None:
    pool, x = drawn(CASES["dolg"][0]).train(), tokens(6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]).bool()
    before = pool.bn.running_mean.clone()
    y = pool(x, mask=mask)
    seen = line(x[mask], pool.conv1)
    mean, var = seen.mean(0), seen.var(0, correction=0)
    torch.testing.assert_close(pool.bn.running_mean, 0.9 * before + 0.1 * mean)
    pool.bn.running_mean.copy_(mean)
    pool.bn.running_var.copy_(var)
    torch.testing.assert_close(y, torch.stack([dolg(pool, row[m]) for row, m in zip(x, mask, strict=True)]))


def test_cait_starts_near_its_class_token() -> None:
    pool = CaiTPool(8, heads=2, dtype=torch.float64)
    assert pool.gamma_1.eq(1e-5).all()
    assert pool.gamma_2.eq(1e-5).all()
    torch.testing.assert_close(
        pool(tokens()), norm(pool.cls_token[0], pool.norm, 1e-5).expand(2, -1), atol=5e-3, rtol=0
    )


def test_parameters() -> None:
    c = 8
    counts = {name: sum(p.numel() for p in make().parameters()) for name, (make, _) in CASES.items()}
    assert counts == {
        "simpool": 2 * c * c + 2 * c,
        "simpool-heads": 2 * c * c + 2 * c,
        "esimpool": 2 * c,
        "aim": 2 * c * c + c,
        "aim-queries": 2 * c * c + 3 * c,
        "cae": 4 * c * c + c + c + 6 * c,
        "vjepa": 12 * c * c + 9 * c + c + 4 * c,
        "siglip": 12 * c * c + 9 * c + c,
        "cait": 12 * c * c + 9 * c + c + 6 * c + 2 * c,
        "coca": c + 2 * c + 3 * 5 * c + 2 * 5 * c + 3 * 5 * c,
        "dolg": 6 * c + 6 + 2 * 6 + 6 + 1,
        "abmilp": 5 * c * c + 3 * c + 1,
        "abmilp-without-attention": c * c + 2 * c + 1,
    }


@pytest.mark.door
def test_errors() -> None:
    for cls in (SimPool, ESimPool, AIMPool, CAEPool, VJEPAPool, SigLIPPool, CaiTPool):
        with pytest.raises(ValueError, match="heads is 3, must divide dim, which is 8"):
            cls(8, heads=3)
    with pytest.raises(ValueError, match="queries is 0"):
        AIMPool(8, heads=2, queries=0)
    with pytest.raises(ValueError, match="head_dim is 0"):
        CoCaPool(8, head_dim=0)
    with pytest.raises(ValueError, match="out is 0"):
        DOLGPool(8, out=0)
    for make, _ in CASES.values():
        with pytest.raises(ValueError, match="x has shape"):
            make()(torch.zeros(2, 3, 4))
        with pytest.raises(ValueError, match="mask has shape"):
            make()(torch.zeros(2, 3, 8), mask=torch.ones(2, 4).bool())
