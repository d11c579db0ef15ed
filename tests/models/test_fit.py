"""FIT and FITAR: a transcription, what sees what, states, counts, learning, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful.models.fit import FIT
from heedful.models.fit_ar import FITAR
from heedful.models.fit_denoiser import FITDenoiser
from heedful.models.fit_stage import parse_layers

T, N, M, D, E = 4, 3, 2, 12, 8  # groups, tokens and latents a group, widths
SIZES = {"groups": T, "group_size": N, "latents": M, "latent_dim": E, "heads": 3, "latent_heads": 2}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def norm(x, part):
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + 1e-6).sqrt() * part.weight + part.bias


def heads_attend(query, key, value, heads, seen):
    """query (n, c), key and value (m, c), seen(i, j): every head and query by itself."""
    width = query.shape[-1] // heads
    rows = []
    for i in range(len(query)):
        visible = [j for j in range(len(key)) if seen(i, j)]
        row = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack([query[i, part] @ key[j, part] / width**0.5 for j in visible])
            weights = scores.exp() / scores.exp().sum()
            row.append(sum(w * value[j, part] for w, j in zip(weights, visible, strict=True)))
        rows.append(torch.cat(row))
    return torch.stack(rows)


def layer(x, block, heads, seen):
    y, mixer = norm(x, block.norm1), block.mixer
    x = x + mixer.out(heads_attend(mixer.query(y), mixer.key(y), mixer.value(y), heads, seen))
    y = block.mlp.wide(norm(x, block.norm2))
    return x + block.mlp.narrow(y * 0.5 * (1 + torch.erf(y / 2**0.5)))


def cross(x, source, part, heads):
    source, y = norm(source, part.source_norm), norm(x, part.norm)
    mixed = heads_attend(part.query(y), part.key(source), part.value(source), heads, lambda i, j: True)
    return x + part.out(mixed)


def transcribed(trunk, x, causal, autoregressive, given=None):
    """x (t, n, d) of one row, already embedded; groups and latents one by one."""
    groups = [x[g] + trunk.place for g in range(len(x))]
    latents = [trunk.latents[g] for g in range(len(x))]
    for stage in trunk.stages:
        for block in stage.local.blocks:
            groups = [
                layer(g, block, 3, (lambda i, j: j <= i) if autoregressive else (lambda i, j: True))
                for g in groups
            ]
        if stage.read is not None:
            latents = [cross(z, g, stage.read, 2) for z, g in zip(latents, groups, strict=True)]
            z = torch.cat(latents)
            if given is not None:
                z = cross(z, given, stage.condition, 2)
            for block in stage.overall.blocks:
                z = layer(z, block, 2, (lambda i, j: j // M <= i // M) if causal else (lambda i, j: True))
            latents = list(z.split(M))
        if stage is not trunk.stages[-1]:
            own = [torch.zeros_like(latents[0]), *latents[:-1]] if autoregressive else latents
            groups = [cross(g, z, stage.write, 2) for g, z in zip(groups, own, strict=True)]
    return torch.stack(groups), torch.stack(latents)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", ["(1)1(1)", "(1)1(0)1"])
def test_fit_is_its_equations(causal, layers):
    model = shaken(FIT(5, D, layers=layers, causal=causal, **SIZES))
    torch.manual_seed(1)
    x = torch.randn(2, T, N, 5, dtype=torch.float64)
    tokens, latents = model(x)
    wanted_tokens, wanted_latents = [], []
    for row in x:
        y, z = transcribed(model.trunk, norm(model.stem(row), model.stem_norm), causal, False)
        wanted_tokens.append(norm(y, model.norm))
        wanted_latents.append(norm(z, model.latent_norm))
    torch.testing.assert_close(tokens, torch.stack(wanted_tokens), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latents, torch.stack(wanted_latents), rtol=1e-9, atol=1e-9)


def test_fit_ar_is_its_equations_and_so_are_its_gradients():
    model = shaken(FITAR(7, D, layers="(1)1(1)1(1)", **SIZES))
    torch.manual_seed(1)
    ids = torch.randint(7, (1, T * N))
    logits = model(ids).logits
    x = model.embedding.weight[ids[0]].unflatten(0, (T, N))
    y = norm(transcribed(model.trunk, x, True, True)[0], model.norm).flatten(0, 1)
    wanted = y @ model.embedding.weight.T + model.bias
    torch.testing.assert_close(logits[0], wanted, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad((v**3).sum(), parameters) for v in (logits, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12 + 1e-7 * float(b.abs().max()))


def test_the_denoiser_is_its_equations():
    model = shaken(FITDenoiser(5, D, layers="(1)1(1)1", **SIZES))
    torch.manual_seed(1)
    x, time = torch.randn(2, T, N, 5, dtype=torch.float64), torch.tensor([0.25, 0.9], dtype=torch.float64)
    condition = torch.randn(2, 3, E, dtype=torch.float64)
    y, latents = model(x, time, condition=condition)
    for row in range(2):
        # A quarter of 8 channels: the frequencies are 1000 alone.
        waves = torch.stack([(1000 * time[row]).sin(), (1000 * time[row]).cos()])
        waves = (waves - waves.mean()) / ((waves - waves.mean()) ** 2).mean().sqrt()
        hidden = model.time.wide(waves)
        token = model.time.out(hidden * hidden.sigmoid())
        given = torch.cat([token[None], condition[row]])
        tokens, z = transcribed(model.trunk, norm(model.stem(x[row]), model.stem_norm), False, False, given)
        torch.testing.assert_close(y[row], model.out(norm(tokens, model.norm)), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(latents[row], z, rtol=1e-9, atol=1e-9)
    assert (model(x, time)[0] - y).abs().max() > 1e-3
    assert count(model) == (
        count(FIT(5, D, layers="(1)1(1)1", **SIZES))
        - 2 * E  # no norm of the latents
        + (D * 5 + 5)
        + (2 * E + E)
        + (E * E + E)
        + 2 * (4 * (E * E + E) + 4 * E)
    )


def test_the_frequencies_of_time():
    model = FITDenoiser(5, 16, layers="(1)1(1)", groups=2, group_size=2, latents=1, latent_dim=32, heads=4)
    seen = []
    model.time.wide.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.time(torch.tensor([0.3]))
    angles = torch.tensor([300.0 * 10000 ** (-j / 4) for j in range(4)])
    waves = torch.cat([angles.sin(), angles.cos()])
    wanted = (waves - waves.mean()) / waves.var(correction=0).sqrt()
    torch.testing.assert_close(seen[0][0], wanted, rtol=1e-3, atol=1e-4)  # float32 angles of 300


def test_the_denoiser_learns():
    torch.manual_seed(0)
    model = FITDenoiser(4, 16, layers="(1)1(1)", groups=2, group_size=4, latents=2, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    data = torch.randn(4, 2, 4, 4)
    losses = []
    for step in range(60):
        time, noise = torch.rand(16), torch.randn(16, 2, 4, 4)
        share = time[:, None, None, None]
        clean = data[torch.randint(4, (16,))]
        loss = (model((1 - share).sqrt() * clean + share.sqrt() * noise, time)[0] - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:5]) / 5


def test_permuted_groups_give_permuted_outputs():
    model = shaken(FIT(5, D, layers="(1)1(1)", **SIZES))
    x = torch.randn(1, T, N, 5, dtype=torch.float64)
    tokens, latents = model(x)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        model.trunk.latents.copy_(model.trunk.latents[order])
    torch.testing.assert_close(model(x[:, order])[0], tokens[:, order])
    torch.testing.assert_close(model(x[:, order])[1], latents[:, order])


def test_the_last_stage_writes_nothing_back():
    model = shaken(FIT(5, D, layers="(1)2", **SIZES))
    x = torch.randn(1, T, N, 5, dtype=torch.float64)
    tokens, latents = model(x)
    with torch.no_grad():
        model.trunk.latents.normal_()
    assert torch.equal(model(x)[0], tokens)
    assert (model(x)[1] - latents).abs().min() > 0


@pytest.mark.parametrize("layers", ["(1)1(1)", "(1)1(1)1(1)", "(1)1(0)1"])
def test_fit_ar_sees_its_group_and_the_past(layers):
    model = shaken(FITAR(7, D, layers=layers, **SIZES))
    torch.manual_seed(1)
    ids = torch.randint(7, (1, 11))
    logits = model(ids).logits[0]
    for place in range(11):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % 7
        moved = (model(other).logits[0] - logits).abs().amax(-1) > 1e-12
        assert torch.equal(moved, torch.arange(11) >= place)


def test_pieces_and_beams():
    model = shaken(FITAR(7, D, layers="(2)1(1)2(1)", **SIZES))
    torch.manual_seed(1)
    ids = torch.randint(7, (3, 11))
    whole = model(ids).logits
    for cuts in (range(12), (0, 2, 3, 7, 8, 9, 11), (0, 11)):
        state, parts = model.init_state(3), []
        for start, stop in pairwise(cuts):
            part, _, state = model(ids[:, start:stop], state=state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
        assert state.length == 11
    rows = torch.tensor([2, 0, 0])
    state = model(ids[:, :8], state=model.init_state(3)).state.reorder(rows)
    torch.testing.assert_close(model(ids[rows, 8:], state=state).logits, whole[rows, 8:])


def test_generation_with_a_state_is_that_of_full_passes():
    model = shaken(FITAR(7, D, layers="(1)1(1)", **SIZES))
    ids = torch.tensor([[1, 2, 3, 4], [6, 5, 4, 3]])
    sequence = ids
    for _ in range(8):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 8), sequence)


def test_layers_are_parsed():
    assert parse_layers("(2)4(2)4(2)") == [(2, 4), (2, 4), (2, 0)]
    assert parse_layers("(1)12") == [(1, 12)]
    assert parse_layers("(3)") == [(3, 0)]


def test_parameter_counts():
    def block(d):
        return 4 * (d * d + d) + 8 * d * d + 5 * d + 4 * d  # attention, MLP of width 4 d, two norms

    inner = min(D, E)
    between = 2 * D + 2 * E  # norms
    read = (E * inner + inner) + 2 * (D * inner + inner) + (inner * E + E) + between
    write = (D * inner + inner) + 2 * (E * inner + inner) + (inner * D + D) + between
    trunk = N * D + T * M * E + (2 + 1 + 1) * block(D) + (2 + 1) * block(E) + 2 * (read + write)
    assert count(FIT(5, D, layers="(2)2(1)1(1)", **SIZES)) == trunk + 5 * D + D + 2 * D + 2 * D + 2 * E
    assert count(FITAR(7, D, layers="(2)2(1)1(1)", **SIZES)) == trunk + 7 * D + 2 * D + 7
    assert count(FITAR(7, D, layers="(2)2(1)1(1)", tied=False, **SIZES)) == trunk + 14 * D + 2 * D + 7


def test_every_parameter_learns():
    model = shaken(FIT(5, D, layers="(1)1(1)1", **SIZES))
    tokens, latents = model(torch.randn(2, T, N, 5, dtype=torch.float64))
    (tokens**3).sum().backward(retain_graph=True)
    (latents**3).sum().backward()
    model_ar = shaken(FITAR(7, D, layers="(1)1(1)", tied=False, **SIZES))
    ids = torch.randint(7, (2, T * N))
    model_ar(ids, labels=ids).loss.backward()
    for part in (model, model_ar):
        for name, parameter in part.named_parameters():
            if not name.endswith("key.bias"):  # a shift of all logits of a query, which softmax does not see
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert model_ar.trunk.latents.grad[-1].eq(0).all()  # no group reads those of the last one
    assert model_ar.trunk.latents.grad[:-1].abs().amax((1, 2)).min() > 0


def test_fit_ar_learns_a_tiny_text():
    torch.manual_seed(0)
    text = "the cat sat on the mat and the dog sat on the log. " * 8
    letters = sorted(set(text))
    ids = torch.tensor([[letters.index(c) for c in text[i : i + 64]] for i in range(0, 256, 32)])
    model = FITAR(
        len(letters), 32, layers="(1)1(1)", groups=8, group_size=8, latents=2, latent_dim=32, heads=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]
    made = model.generate(torch.tensor([[letters.index(c) for c in text[:32]]]), 16)[0]
    assert "".join(letters[i] for i in made) == text[:48]


def test_the_loss_is_of_the_next_token():
    model = shaken(FITAR(7, D, layers="(1)1(1)", **SIZES))
    ids = torch.randint(7, (2, 8))
    logits, loss, state = model(ids, labels=ids)
    assert state is None
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.door
def test_errors():
    model = FITAR(7, D, layers="(1)1(1)", **SIZES)
    long = torch.zeros(1, T * N + 1, dtype=torch.long)
    for call, message in (
        (lambda: model(long), "ids reaches 13 tokens, must be at most 12"),
        (lambda: model.generate(long[:, :10], 5), "ids reaches 13 tokens, must be at most 12"),
        (lambda: model(long[0]), r"ids has shape \(13,\), must be \(batch, tokens\)"),
        (lambda: model.generate(long[:, :0], 5), "ids has no tokens"),
        (lambda: model(long[:, :6], labels=long[:, :4]), r"labels has shape \(1, 4\), must be \(1, 6\)"),
        (
            lambda: FITDenoiser(5, D, groups=2, group_size=2, latents=1, heads=3),
            "latent_dim is 12, must be a",
        ),
        (lambda: FITDenoiser(5, D, **SIZES)(torch.zeros(1, T, N, 5), torch.zeros(2)), "time has shape"),
        (lambda: FIT(5, D, layers="2(4)", **SIZES), "layers is '2\\(4\\)', must be written like"),
        (lambda: FIT(5, D, layers="(1)0(2)", **SIZES), "must have global layers in every stage but the last"),
        (lambda: FIT(5, D, layers="(1)1(1)", **{**SIZES, "heads": 5}), "heads is 5, must divide dim"),
        (lambda: FIT(5, D, **{**SIZES, "latents": 0}), "latents is 0"),
        (lambda: FIT(5, D, **SIZES)(torch.zeros(1, T, N, 4)), r"x has shape \(1, 4, 3, 4\), must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
