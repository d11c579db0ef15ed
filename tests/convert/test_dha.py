"""Decoupled heads: groups are found, fusion ends in equal heads, merging then loses nothing."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import HeadGroups, fuse_gradually, search_groups, to_dha
from heedful.convert.sites import find_sites
from tests.convert.tiny import cache_bytes, check_decodes, check_loads, outcome, texts, tiny

# Keys and values in groups of their own, in every layer others.
PLANTED = {
    0: HeadGroups([0, 1, 0, 2, 1, 2], [0, 0, 0, 1, 1, 1]),
    1: HeadGroups([0, 1, 1, 1, 1, 0], [0, 1, 2, 3, 2, 1]),
}
KEPT = 3 + 2 + 2 + 4


def planted(model):
    """Heads of a group get the weights of its first."""
    with torch.no_grad():
        for site in find_sites(model):
            own = PLANTED[site.layer]
            for linear, group in ((site.key, own.key), (site.value, own.value)):
                for p in linear.parameters():
                    heads = p.unflatten(0, (-1, site.head_dim))
                    heads.copy_(heads[[group.index(g) for g in group]].clone())
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Bert"])
@pytest.mark.parametrize("data", [False, True])
def test_planted_groups_are_found_and_merging_them_changes_nothing(kind, data, tmp_path):
    model = planted(tiny(kind))
    groups = search_groups(model, budget=KEPT / 24, batches=[texts()] if data else ())
    assert groups == PLANTED
    merged, report = to_dha(model, groups)
    torch.testing.assert_close(outcome(merged), outcome(model), rtol=1e-4, atol=1e-4)
    if kind == "Bert":
        check_loads(merged, tmp_path)
    else:
        assert report.cache_bytes == (cache_bytes(model), cache_bytes(merged)) == (24 * 8 * 4, KEPT * 8 * 4)
        # The static cache of transformers holds as many value heads as key heads.
        check_decodes(merged, tmp_path, static=False)


def test_costs_are_those_of_joining():
    """Every pair of heads, tried out: the cheapest in the whole model is joined first."""
    model = tiny("Llama")
    costs = {}
    for site in find_sites(model):
        for name, linear in (("key", site.key), ("value", site.value)):
            w = linear.weight.detach().double().view(6, -1)
            for a in range(6):
                for b in range(a):
                    middle = (w[a] + w[b]) / 2
                    lost = (w[a] - middle).square().sum() + (w[b] - middle).square().sum()
                    costs[site.layer, name, b, a] = (lost / w.square().sum()).item()
    layer, name, b, a = min(costs, key=costs.get)
    groups = search_groups(model, budget=23 / 24)
    found = getattr(groups[layer], name)
    assert found[a] == found[b]
    assert sum(max(g.key) + max(g.value) + 2 for g in groups.values()) == 23


def test_one_head_each_is_the_model():
    model = tiny("Llama")
    groups = search_groups(model, budget=1.0)
    same, report = to_dha(model, groups)
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-5, atol=1e-5)
    assert report.cache_bytes[0] == report.cache_bytes[1]


def test_equal_groups_are_grouped_queries():
    from heedful.convert import to_gqa

    model = tiny("Llama")
    run = HeadGroups([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(
        outcome(to_dha(model, {0: run, 1: run})[0]),
        outcome(to_gqa(model, kv_heads=3)[0]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", ["Qwen2", "Bert"])
def test_fusion_is_gradual_and_leaves_little_to_lose(kind):
    model = tiny(kind, initializer_range=0.1)
    groups = search_groups(model, budget=0.5)
    names = [n for n, _ in model.named_parameters()]
    unprepared = (outcome(to_dha(model, groups)[0]) - outcome(model)).norm()
    history = fuse_gradually(model, groups, [texts()], steps=70, ratio_lr=0.04, progress=False)
    shares = [h["fusion"] for h in history]
    assert shares[0] == pytest.approx(1.0, abs=1e-4) and shares[-1] < 0.005
    for step in (15, 25, 35):  # the target is 1 - step / 49
        assert abs(shares[step] - (1 - step / 49)) < 0.15
    assert [n for n, _ in model.named_parameters()] == names and not model.training
    # Heads of a group agree to some hundredths; a random language model makes most of these.
    assert (outcome(to_dha(model, groups)[0]) - outcome(model)).norm() < 0.3 * unprepared


def test_fusion_starts_at_the_model():
    """Ratios are the identity: with all learning rates 0 nothing happens to the weights."""
    model = tiny("Qwen2")
    groups = search_groups(model, budget=0.5)
    start = outcome(model)
    fuse_gradually(model, groups, [texts()], steps=2, lr=0.0, ratio_lr=0.0, multiplier_lr=0.0, progress=False)
    torch.testing.assert_close(outcome(model), start)


@pytest.mark.door
def test_errors():
    model = tiny("Llama")
    good = HeadGroups([0] * 6, [0] * 6)
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="budget is"):
            search_groups(model, budget=budget)
    for groups, told in (
        ({}, "groups is empty"),
        ({5: good}, "layers names 5"),
        ({0: HeadGroups([0] * 5, [0] * 6)}, r"as key of layer 0, must hold for each of 6 heads"),
        ({0: HeadGroups([0] * 6, [0, 0, 0, 0, 0, 2])}, "as value of layer 0"),
    ):
        with pytest.raises(ValueError, match=told):
            to_dha(model, groups, copy=False)
    with pytest.raises(ValueError, match="batches is empty"):
        fuse_gradually(model, {0: good}, [])
    single = HeadGroups([*range(6)], [*range(6)])
    with pytest.raises(ValueError, match="must have some to fuse"):
        fuse_gradually(model, {0: single}, [texts()])
