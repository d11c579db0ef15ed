"""Layer reuse: the plan against brute force, profiles against eager weights, steps against a dense mask."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as hf

from heedful.cache import LayerReuseCache, layer_overlap, layer_sensitivity, plan_layer_reuse
from tests.cache_families import made, stepwise, tokens


def brute_force(shared, must, overlap):
    """The best (full layers, -sum of overlaps) over all sets of full layers."""
    layers, best = len(shared), None
    for rest in itertools.product([False, True], repeat=layers - 1):
        full, gain, fits, last = [True, *rest], 0.0, True, 0
        for j in range(1, layers):
            if full[j]:
                last = j
            else:
                fits = fits and shared[last][j] >= overlap and not must[j]
                gain += shared[last][j]
        if fits and (best is None or (sum(full), -gain) < best):
            best = (sum(full), -gain)
    return best


def cost(sources, shared):
    return sum(s is None for s in sources), -sum(shared[s][j] for j, s in enumerate(sources) if s is not None)


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_as_good_as_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    layers = 2 + seed % 9
    shared = torch.rand(layers, layers, generator=generator, dtype=torch.float64)
    must = (torch.rand(layers, generator=generator) < 0.2).tolist()
    sources = plan_layer_reuse(shared, sensitive=must, overlap=0.4)
    told = shared.tolist()
    for j, source in enumerate(sources):
        if source is not None:
            assert told[source][j] >= 0.4 and not must[j]
            assert sources[source] is None and None not in sources[source + 1 : j]
    assert cost(sources, told) == pytest.approx(brute_force(told, must, 0.4))


def test_bounds_of_the_plan():
    shared = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    assert plan_layer_reuse(shared, overlap=1.01) == [None] * 6
    assert plan_layer_reuse(shared, overlap=0.0) == [None, 0, 0, 0, 0, 0]
    assert plan_layer_reuse(shared, sensitive=[True] * 6, overlap=0.0) == [None] * 6


def test_profiles_equal_those_of_eager_weights():
    model, ids = made(num_hidden_layers=3), tokens(2, 19)
    shared = layer_overlap(model, [ids], tokens=5)
    found = layer_sensitivity(model, [ids], tokens=5)
    assert torch.equal(shared, shared.mT) and torch.equal(shared.diagonal(), torch.ones(3))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    chosen = [[set(w[b, :, -1].mean(0).topk(5).indices.tolist()) for b in range(2)] for w in weights]
    for i, j in itertools.product(range(3), repeat=2):
        wanted = sum(len(a & b) for a, b in zip(chosen[i], chosen[j], strict=True)) / 10
        assert float(shared[i, j]) == pytest.approx(wanted)
    assert (found.error > 0).all() and (found.divergence > 0).all()
    nothing = layer_sensitivity(model, [ids], tokens=19)
    assert (nothing.error < 1e-5).all() and (nothing.divergence < 1e-5).all()


def test_sensitivity_by_hand():
    """The error of the last layer from its own eager weights."""
    model, ids = made(num_hidden_layers=1), tokens(1, 12)
    found = layer_sensitivity(model, [ids], tokens=3)
    full = hf.DynamicCache(config=model.config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, past_key_values=full, output_attentions=True).attentions[0][0, :, -1]
    value = full.layers[0].values[0].repeat_interleave(2, dim=0)
    cut = torch.zeros_like(weights)
    kept = weights.mean(0).topk(3).indices
    cut[:, kept] = weights[:, kept] / weights[:, kept].sum(1, keepdim=True)
    whole, part = (torch.einsum("hm, hmd -> hd", w, value) for w in (weights, cut))
    assert float(found.error) == pytest.approx(float((part - whole).norm() / whole.norm()), rel=1e-4)


def test_a_reuse_layer_sees_the_choice_of_its_source():
    """Each step equals a dense step in which the last layers' rows are masked to the first layer's choice."""
    model, ids = made(num_hidden_layers=3), tokens(1, 22)
    cache = LayerReuseCache(model, sources=[None, 0, 0], tokens=6, sinks=1, recent=2)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        full = hf.DynamicCache(config=model.config)
        model(ids[:, :15], past_key_values=full)
        for i in range(15, 22):
            got = model(ids[:, i : i + 1], past_key_values=cache).logits
            chosen = cache.layers[0].chosen[0].tolist()
            assert len(chosen) == 6 and {0, i - 1, i} <= set(chosen)

            def narrow(module, args, kwargs, chosen=chosen, i=i):
                bias = torch.full((1, 1, 1, i + 1), -torch.inf)
                bias[..., chosen] = 0.0
                return args, kwargs | {"attention_mask": bias}

            hooks = [
                model.model.layers[j].self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
                for j in (1, 2)
            ]
            wanted = model(ids[:, i : i + 1], past_key_values=full).logits
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # float32, weights * 4


def test_calibrated_cache():
    model, ids = made(num_hidden_layers=4), tokens(1, 30)
    everything = LayerReuseCache.calibrated(
        model, [ids], tokens=8, overlap=0.0, sensitivity=100.0, sinks=1, recent=2
    )
    assert [layer.source is None for layer in everything.layers] == [True, False, False, False]
    assert everything.layers[3].source is everything.layers[0]
    strict = LayerReuseCache.calibrated(model, [ids], tokens=8, sensitivity=0.0, sinks=1, recent=2)
    assert all(layer.source is None for layer in strict.layers)
    wanted = stepwise(model, ids, hf.DynamicCache(config=model.config), 20)
    torch.testing.assert_close(stepwise(model, ids, strict, 20), wanted)


@pytest.mark.door
def test_errors_say_what_to_do():
    model = made(num_hidden_layers=3)
    for sources, match in (
        ([None, 0], "sources has 2 entries, must have one for each of 3 layers"),
        ([None, 0, 1], "sources has 1 for layer 2, must have None or the last full layer before it, 0"),
        ([0, None, None], "sources has 0 for layer 0, must have None"),
    ):
        with pytest.raises(ValueError, match=match):
            LayerReuseCache(model, sources=sources)
    with pytest.raises(ValueError, match=r"sinks \+ recent is 4 \+ 128, must be at most tokens, which is 64"):
        LayerReuseCache(model, sources=[None, 0, 0], tokens=64)
    with pytest.raises(ValueError, match="samples is empty"):
        LayerReuseCache.calibrated(model, [])
    with pytest.raises(ValueError, match="shared has shape"):
        plan_layer_reuse(torch.zeros(2, 3))
