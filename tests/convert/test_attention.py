"""What converted attention of all kinds does alike: implementations, taps, half precision, gradients."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import HeadGroups, grow_signal_heads, prune_heads, to_dha, to_gqa, to_mla, to_moh
from heedful.hf import Handler, tap, use_pattern
from heedful.patterns import Window
from tests.convert.tiny import outcome, texts, tiny

GROUPS = HeadGroups([0, 1, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1])
MADE = {
    "gqa": lambda m: to_gqa(m, kv_heads=2)[0],
    "pruned": lambda m: prune_heads(m, {0: [4, 1], 1: [0, 2, 3]})[0],
    "mla": lambda m: to_mla(m, kv_rank=16)[0],
    "dha": lambda m: to_dha(m, {0: GROUPS, 1: GROUPS})[0],
    "moh": lambda m: to_moh(m)[0],
    "grown": lambda m: grow_signal_heads(m, times=2)[0],
}
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}


def made(name, **changes):
    if name == "grown":
        return MADE[name](tiny("DiffLlama", **SHAPE, **changes))
    return MADE[name](tiny("Qwen2", **changes))


@pytest.mark.parametrize("name", MADE)
def test_attention_implementations_agree(name):
    model = made(name)
    expected = outcome(model)
    for implementation in ("eager", "heedful"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-4)
    with use_pattern(Window(1, 0)):
        assert not torch.allclose(outcome(model), expected, atol=1e-2)


@pytest.mark.parametrize("name", MADE)
def test_taps_see_every_layer(name):
    class See(Handler):
        def __init__(self):
            self.layers = set()

        def see(self, site):
            self.layers.add(site.layer)

    model, seen = made(name), See()
    expected = outcome(model)
    with tap(model, seen):
        torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-4)
    assert seen.layers == {0, 1}


@pytest.mark.parametrize("name", MADE)
def test_every_parameter_learns(name):
    model = made(name).train()
    batch = texts()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # A bias of all keys of a head without rotary embedding would have none; here all are turned.
    assert not dead


@pytest.mark.parametrize("name", MADE)
def test_bfloat16(name):
    whole, half = made(name, initializer_range=0.05), made(name, initializer_range=0.05).bfloat16()
    again = MADE[name](
        (
            tiny("DiffLlama", **SHAPE, initializer_range=0.05)
            if name == "grown"
            else tiny("Qwen2", initializer_range=0.05)
        ).bfloat16()
    )
    for model in (half, again):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        difference = (outcome(model).float() - outcome(whole)).norm() / outcome(whole).norm()
        assert difference < 0.1
