"""The cache among a model's arguments, under either name that transformers has had for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heedful.hf.cache_name import CACHE, NAMES, cache_of, with_cache


def test_either_name_is_understood_and_one_is_given():
    for name in NAMES:
        given = {"input_ids": 1, name: "mine"}
        assert cache_of(given) == "mine"
        assert with_cache(given, "other") == {"input_ids": 1, CACHE: "other"}
    assert cache_of({"cache": None, "past_key_values": "mine"}) == "mine"
    assert cache_of({"input_ids": 1}) is None
    assert with_cache({"cache": 1, "past_key_values": 2}, None) == {CACHE: None}


def test_a_model_gives_its_cache_by_that_name_and_takes_it():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=1, **sizes)).eval()
    ids = torch.arange(6)[None]
    first = model(ids[:, :4], use_cache=True)
    after = model(ids[:, 4:], **{CACHE: getattr(first, CACHE)})
    torch.testing.assert_close(after.logits, model(ids).logits[:, 4:])
