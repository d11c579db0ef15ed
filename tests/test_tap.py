"""Seeing and changing the attention calls of transformers models, and leaving no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from heedful.hf import Handler, Site, tap

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=3)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=4, sliding_window=3)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
}


class Record(Handler):
    def __init__(self):
        self.weights_of, self.names, self.chunks, self.lses = {}, {}, {}, {}

    def see(self, site: Site) -> None:
        self.weights_of[site.layer] = site.weights()
        self.chunks[site.layer] = torch.cat([site.weights(slice(i, i + 3)) for i in range(0, 8, 3)], dim=2)
        self.lses[site.layer] = (site.logits().logsumexp(-1), site.lse())
        self.names[site.layer] = site.name


class Scale(Handler):
    def __init__(self, factor: float):
        self.factor = factor

    def weights(self, site: Site, weights: torch.Tensor) -> torch.Tensor:
        return weights * self.factor


class Add(Handler):
    def output(self, site: Site, output: torch.Tensor) -> torch.Tensor:
        return output + 1


def made(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :2] = 0
    return model, {"input_ids": torch.randint(0, 31, (2, 8)), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(family):
    model, inputs = made(family)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    record = Record()
    with torch.no_grad():
        wanted = eager(**inputs, output_attentions=True)
        before = model(**inputs)[0]
        with tap(model, record):
            inside = model(**inputs)[0]
        after = model(**inputs)[0]
    assert torch.equal(before, after)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(inside[valid], wanted[0][valid], rtol=1e-4, atol=1e-5)  # float32
    for layer, weights in enumerate(wanted.attentions):
        rows = valid[:, None, :, None].expand_as(weights)  # what padding sees is nobody's business
        torch.testing.assert_close(record.weights_of[layer][rows], weights[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(record.chunks[layer], record.weights_of[layer])
        assert (
            record.names[layer].split(".")[-2 if "bert" in family else -1].startswith(("self", "attention"))
        )
        ours, lse = record.lses[layer]
        torch.testing.assert_close(lse, ours)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_changes_act_in_order_and_leave_no_trace(family):
    model, inputs = made(family)
    own = model.config._attn_implementation
    with torch.no_grad():
        wanted = model(**inputs)[0]
        with tap(model, Scale(0.5)), tap(model, Scale(2.0)):
            assert model.config._attn_implementation == "heedful-tap"
            twice = model(**inputs)[0]
            with tap(model, Add()):
                assert not torch.allclose(model(**inputs)[0], wanted)
            torch.testing.assert_close(model(**inputs)[0], twice)
        torch.testing.assert_close(twice, wanted, rtol=1e-4, atol=1e-5)  # float32
        with pytest.raises(TypeError), tap(model, Scale("no number")):
            model(**inputs)
        assert torch.equal(model(**inputs)[0], wanted)
    assert model.config._attn_implementation == own


def test_generation_is_seen_step_by_step():
    model, inputs = made("llama")
    sizes = []

    class Sizes(Handler):
        def see(self, site: Site) -> None:
            if site.layer == 0:
                sizes.append((site.query.shape[2], site.key.shape[2], site.key.shape[1], site.prefill))

    wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with tap(model, Sizes()):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)
    assert sizes == [(8, 8, 2, True), (1, 9, 2, False), (1, 10, 2, False)]


@pytest.mark.door
def test_refuses_what_is_no_model():
    with (
        pytest.raises(ValueError, match="model is a Linear, must be a transformers"),
        tap(torch.nn.Linear(1, 1)),
    ):
        pass
