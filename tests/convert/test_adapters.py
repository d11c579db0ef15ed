"""p-adapters in frozen models: silent ones change nothing, loud ones what the block says, and they learn."""

from __future__ import annotations

import pytest
import torch
import transformers

from heedful.convert import add_p_adapters, load, recover
from heedful.convert.adapters import AdaptedAttention, AdaptedFeedForward
from heedful.mixers.heads.p_adapter import PAdapterAttention
from tests.convert.tiny import check_loads, outcome, texts, tiny

SMALL = {"reduction": 2, "samples": 4}


def silent(model):
    """The same adapters, which say nothing."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (AdaptedAttention, AdaptedFeedForward)):
                adapter = module.adapter if hasattr(module, "adapter") else module.block.output.adapter
                adapter.up.weight.zero_()
                adapter.up.bias.zero_()
    return model


def decoder():
    """A BLIP text decoder, whose cross attention reads the images of an encoder."""
    torch.manual_seed(0)
    config = transformers.BlipTextConfig(
        vocab_size=61,
        hidden_size=48,
        encoder_hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        initializer_range=0.2,
        bos_token_id=1,
        sep_token_id=2,
        pad_token_id=0,
    )
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    model = BlipTextLMHeadModel(config).eval()
    images = torch.randn(2, 7, 20)
    ids = torch.randint(3, 61, (2, 6))
    return model, {"input_ids": ids, "encoder_hidden_states": images, "is_decoder": True}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_silent_adapters_change_nothing_and_come_back(kind, tmp_path):
    model = tiny(kind)
    new, report = add_p_adapters(model, **SMALL)
    assert not torch.allclose(outcome(new), outcome(model), atol=1e-2)
    check_loads(new, tmp_path)
    again = load(tmp_path)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in new.parameters()]
    torch.testing.assert_close(outcome(silent(new)), outcome(model), rtol=1e-4, atol=1e-5)
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in new.named_parameters() if ".adapter." in name}
    # After attention three layers, p and theta; beside the net two layers.
    each = 3 * 48 * 24 + 2 * 24 + 48 + 2 + 2 * 48 * 24 + 24 + 48
    assert report.parameters[1] - report.parameters[0] == 2 * each
    (first, _) = report.changes
    assert (first.before.what, first.after.what) == ("6 heads", "6 heads, adapters")
    own = 4 * 48 * 48 + 2 * 48 * 40 + 2 * 1024 * 48
    assert first.before.multiply_adds == own
    assert first.after.multiply_adds == own + 5 * 48 * 24 + 48 * 48 + 1024 * 24


@torch.no_grad()
def test_a_layer_is_the_block_of_the_mixer():
    new, _ = add_p_adapters(tiny("Bert"), **SMALL)
    layer, x, mask = new.encoder.layer[0], torch.randn(2, 9, 48), texts()["attention_mask"].bool()
    block = PAdapterAttention(48, heads=6, **SMALL, norm_eps=1e-12).eval()
    block.load_state_dict(layer.attention.block.state_dict())
    wanted = block(x, mask=mask)
    y, _ = layer.attention(x, torch.where(mask, 0.0, torch.finfo(x.dtype).min)[:, None, None])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(layer.attention(x, mask[:, None, None].expand(2, 1, 9, 9))[0], wanted)
    net, a = layer.output, torch.nn.functional.linear
    inner = layer.intermediate(y)
    r = y + a(
        a(y, net.adapter.down.weight, net.adapter.down.bias).relu(),
        net.adapter.up.weight,
        net.adapter.up.bias,
    )
    torch.testing.assert_close(layer(x, mask[:, None, None]), net.norm(net.dense(inner) + r))


@torch.no_grad()
def test_decoder_with_cross_attention(tmp_path):
    """Prefill and steps through the cache are the whole; the cross attention is that of the mixer."""
    model, inputs = decoder()
    new, report = add_p_adapters(model, **SMALL)
    same = silent(add_p_adapters(model, **SMALL)[0])
    torch.testing.assert_close(same(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    whole = new(**inputs).logits
    cache, pieces = None, []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        step = {**inputs, "input_ids": inputs["input_ids"][:, start:end]}
        out = new(**step, past_key_values=cache, use_cache=True)
        cache, pieces = out.past_key_values, [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-3)
    kept = cache.self_attention_cache.layers[0]
    held = (kept.keys.numel() + kept.values.numel()) * 4 // (2 * 6)
    assert report.changes[0].before.cache_bytes == report.changes[0].after.cache_bytes == held
    part, x = new.bert.encoder.layer[1].crossattention, torch.randn(2, 6, 48)
    wanted = part.block.attend(
        x,
        *(
            f(y).unflatten(-1, (6, 8)).transpose(1, 2)
            for f, y in (
                (part.block.query, x),
                (part.block.key, inputs["encoder_hidden_states"]),
                (part.block.value, inputs["encoder_hidden_states"]),
            )
        ),
        own=False,
    )
    torch.testing.assert_close(part(x, encoder_hidden_states=inputs["encoder_hidden_states"])[0], wanted)
    new.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).eval()(**inputs).logits, whole)


def test_a_causal_bert_under_sdpa():
    """Its mask may be left out there."""
    model = transformers.BertLMHeadModel(tiny("Bert", is_decoder=True).config).eval()
    new, _ = add_p_adapters(model, **SMALL)
    ids = texts(2, 6)["input_ids"]
    with torch.no_grad():
        wanted = new(input_ids=ids).logits
        new.set_attn_implementation("sdpa")
        torch.testing.assert_close(new(input_ids=ids).logits, wanted)
        torch.testing.assert_close(new(input_ids=ids[:, :4]).logits, wanted[:, :4], rtol=1e-4, atol=1e-4)
        out = new.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        again = new.generate(
            ids, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None
        )
    assert torch.equal(out, again)


def test_adapters_learn_and_nothing_else_does():
    teacher = tiny("Bert")
    student, _ = add_p_adapters(teacher, **SMALL)
    before = {name: p.clone() for name, p in student.named_parameters()}
    history = recover(student, teacher, [texts(4, 9)], steps=40, lr=3e-3, progress=False)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) != (".adapter." in name), name


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="model is of type 'llama', must be one of bert"):
        add_p_adapters(tiny("Llama"))
    model = tiny("Bert")
    with pytest.raises(ValueError, match="reduction is 5, must divide"):
        add_p_adapters(model, reduction=5, copy=False)
    assert all(p.requires_grad for p in model.parameters())
    new, _ = add_p_adapters(model, **SMALL)
    with pytest.raises(ValueError, match="model has adapters"):
        add_p_adapters(new)
    import heedful.hf  # noqa: F401

    new.set_attn_implementation("heedful")
    with pytest.raises(ValueError, match='must be "eager" or "sdpa"'):
        new(**texts())
