"""DecoderLM and Encoder in transformers: Auto classes, generate, beams, padding, pipeline, Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from heedful.models import hf
from heedful.models.decoder_lm import DecoderLM
from heedful.models.encoder import Encoder
from heedful.registry import index

SEQUENCE = {e.name: e for e in index().values() if e.kind == "sequence"}
DECODERS = sorted(name for name, e in SEQUENCE.items() if e.causal != "never" and e.decode)
HYBRID = ["mamba", "gated-deltanet", ("self-attention", {"kv_heads": 2})]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "log", ".", "[pad]"]


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal weights may lie differently in memory, which float64 sums feel in the last digits."""
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def causal(**how) -> nn.Module:
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.DecoderLMConfig(**{**sizes, "mixers": HYBRID, **how})
    return shaken(transformers.AutoModelForCausalLM.from_config(config))


def prompt() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": torch.randint(17, (2, 9)), "attention_mask": mask}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[pad]", unk_token=".", padding_side="left"
    )


def test_greedy_generation_is_heedfuls_own():
    model, given = causal(), prompt()
    made = model.generate(**given, max_new_tokens=6, do_sample=False)
    wanted = model.model.generate(given["input_ids"], 6, mask=given["attention_mask"].bool())
    assert torch.equal(made, wanted)
    alone = model.generate(given["input_ids"][1:, 3:], max_new_tokens=6, do_sample=False)
    assert torch.equal(alone, made[1:, 3:])


@pytest.mark.parametrize(
    "how", [{"do_sample": True, "top_k": 5}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_with_states_and_by_full_passes(how):
    model, given, results = causal(), prompt(), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(**given, max_new_tokens=7, use_cache=use_cache, **how))
    assert torch.equal(*results)


def test_a_given_cache_is_continued():
    model, ids = causal(), prompt()["input_ids"]
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = hf.StateCache()
    model(ids[:, :5], past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), whole)
    assert cache.get_seq_length() == 14
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="is a DynamicCache, must be a StateCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(1)


@pytest.mark.parametrize(
    "mixers", ["union-mlp", ("titans-mag", {"window": 4, "memory": {"chunk_size": 2}}), "self-attention"]
)
def test_rows_of_a_cache_are_repeated(mixers):
    model, ids = causal(mixers=mixers), prompt()["input_ids"]
    cache = model(ids[:, :6]).past_key_values
    assert cache.batch_size == 2
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    wanted = model(ids, use_cache=False).logits[:, 6:].repeat_interleave(2, 0)
    got = model(ids[:, 6:].repeat_interleave(2, 0), past_key_values=cache).logits
    # float64: the forms of one sum differ in rounding alone
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_save_and_load_keeps_every_mixer(name, tmp_path):
    given = SEQUENCE[name].load().example
    given = {k: v for k, v in given.items() if k not in ("dim", "heads", "causal")}
    model = causal(num_hidden_layers=1, mixers=(name, given))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = prompt()["input_ids"]
    same(again(ids).logits, model(ids).logits)
    assert torch.equal(again.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_of_a_model_and_back(tmp_path):
    ours = shaken(DecoderLM(17, 16, depth=3, heads=4, mixers=HYBRID, tied=False))
    form = hf.DecoderLMForCausalLM.of(ours)
    assert form.model is ours and not form.training
    ids = prompt()["input_ids"]
    out = form(ids, labels=ids, use_cache=False)
    logits, loss, _ = ours(ids, labels=ids)
    assert torch.equal(out.logits, logits) and torch.equal(out.loss, loss)
    assert out.past_key_values is None
    torch.testing.assert_close(form(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert isinstance(form(ids, return_dict=False), tuple)
    form.save_pretrained(tmp_path)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(told.values())
    same(again(ids).logits, logits)
    base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    same(base(ids).last_hidden_state, ours.encode(ids)[0])


def test_what_cannot_decode_generates_by_full_passes():
    model, given = causal(mixers="self-attention"), prompt()
    wanted = model.generate(**given, max_new_tokens=3, do_sample=False)
    model.model.mixers[1].entry = SEQUENCE["l2vit"]
    with pytest.raises(ValueError, match="'l2vit' in layer 1, which does not decode step by step"):
        model.generate(**given, max_new_tokens=3)
    made = model.generate(**given, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(made, wanted)


def test_encoder_forms(tmp_path):
    ours = shaken(Encoder(17, 16, depth=2, heads=4))
    form = hf.EncoderForMaskedLM.of(ours)
    given = prompt()
    mask = given["attention_mask"].bool()
    labels = torch.where(mask, given["input_ids"], -100)
    out = form(**given, labels=labels)
    wanted = ours(given["input_ids"], mask=mask, labels=labels)
    assert torch.equal(out.logits, wanted.logits) and torch.equal(out.loss, wanted.loss)
    form.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    same(again(**given).logits, out.logits)
    base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    hidden = base(**given).last_hidden_state
    same(hidden, ours.encode(given["input_ids"], mask=mask)[0])

    # The head is new: it starts at small numbers, the encoder is that of the checkpoint.
    classify = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, dtype=torch.float64
    )
    assert 0 < classify.classifier.weight.abs().max() < 0.1
    assert classify.classifier.bias.eq(0).all()
    out = classify(**given, labels=torch.tensor([2, 0]))
    mean = torch.stack([hidden[0].mean(0), hidden[1, 3:].mean(0)])
    torch.testing.assert_close(out.logits, mean @ classify.classifier.weight.T)
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(-1)[[0, 1], [2, 0]].mean())


def masked(**how) -> nn.Module:
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return shaken(transformers.AutoModelForMaskedLM.from_config(hf.EncoderConfig(**{**sizes, **how})))


@pytest.mark.parametrize("made", [causal, masked])
def test_hidden_states_are_those_between_the_layers(made):
    model, given = made(mixers="self-attention", mlp="polynorm"), prompt()
    out = model(**given, output_hidden_states=True)
    ours, mask = model.model, given["attention_mask"].bool()
    x = ours.embedding(given["input_ids"])
    wanted = [x]
    for layer in ours.layers:
        x = layer(x, mask=mask)
        wanted.append(x)
    wanted[-1] = ours.norm(x)
    torch.testing.assert_close(out.hidden_states, tuple(wanted))
    torch.testing.assert_close(out.logits, ours.logits(wanted[-1]))
    assert model(**given).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**given).hidden_states) == len(wanted)
    assert not any(layer._forward_pre_hooks for layer in ours.layers)


def test_generation_gives_hidden_states():
    model, given = causal(), prompt()
    made = model.generate(
        **given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [[tuple(h.shape) for h in step] for step in made.hidden_states] == [
        4 * [(2, 9, 16)],
        4 * [(2, 1, 16)],
        4 * [(2, 1, 16)],
    ]
    whole = model(made.sequences, torch.cat([given["attention_mask"], torch.ones(2, 3).long()], 1)[:, :12])
    last = model.model.logits(made.hidden_states[-1][-1][:, -1])
    # float64, steps against the whole
    torch.testing.assert_close(last, whole.logits[:, 10], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_give_the_same_gradients(reentrant):
    model, given = causal(mixers=["gated-deltanet", "self-attention", "union-mlp"]).train(), prompt()
    model.model.mixers[2].dropout = 0.0
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        model.zero_grad()
        out = model(**given, labels=given["input_ids"])
        # The reentrant form cuts what leaves a layer by the side, as auxiliary losses do.
        loss = out.loss if reentrant else out.loss + sum(model.model.aux_losses.values())
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs.clear()
    got = gradients()
    assert len(runs) == 2
    assert ("model.layers.2.mixer.gate.linear.weight" in wanted) == (not reentrant)
    torch.testing.assert_close(got, wanted)
    model.activation_checkpointing_disable()
    runs.clear()
    model(**given)
    assert len(runs) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_kept(tied, tmp_path):
    model, ids = causal(mixers="self-attention", tie_word_embeddings=tied), prompt()["input_ids"]
    logits = model(ids).logits
    model.resize_token_embeddings(21)
    assert model.model.vocabulary == model.config.vocab_size == 21
    same(model(ids).logits[..., :17], logits)
    model.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    same(again(ids).logits, model(ids).logits)
    model.model.save(tmp_path / "ours")
    ours = DecoderLM.load(tmp_path / "ours", dtype=torch.float64).eval()
    same(ours(ids).logits, model(ids).logits)


def test_mixers_from_a_factory_serve_but_cannot_be_saved(tmp_path):
    factory = SEQUENCE["self-attention"].load()
    ours = DecoderLM(17, 16, depth=1, mixers=lambda dim: factory(dim, heads=2, causal=True))
    model = hf.DecoderLMForCausalLM.of(shaken(ours))
    ids = prompt()["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), ours.generate(ids, 3))
    with pytest.raises(ValueError, match="mixers holds what JSON cannot, must be names"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plain_call_asks_no_state_of_what_cannot_decode():
    model, given = causal(mixers="self-attention"), prompt()
    wanted = model(**given)
    assert wanted.past_key_values is not None
    model.model.mixers[1].entry = SEQUENCE["l2vit"]
    out = model(**given)
    assert out.past_key_values is None
    same(out.logits, wanted.logits)


def test_losses_of_classification():
    def classifier(labels, **how):
        config = hf.EncoderConfig(
            vocab_size=17,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_labels=labels,
            id2label={i: str(i) for i in range(labels)},
            **how,
        )
        return shaken(transformers.AutoModelForSequenceClassification.from_config(config))

    given = prompt()
    x, y = torch.randn(2, dtype=torch.float64), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).double()
    out = classifier(1)(**given, labels=x)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - x).square().mean())
    out = classifier(3)(**given, labels=y)
    p = out.logits.sigmoid()
    torch.testing.assert_close(out.loss, -(y * p.log() + (1 - y) * (1 - p).log()).mean())
    out = classifier(3, problem_type="regression")(**given, labels=y)
    torch.testing.assert_close(out.loss, (out.logits - y).square().mean())
    out = classifier(3)(**given, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(-1)[[0, 1], [2, 0]].mean())


def test_pipelines_of_encoders_with_a_bert_tokenizer():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    words = transformers.BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    assert "token_type_ids" in words("the cat")
    config = hf.EncoderConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    texts = ["the [MASK] sat", "the [MASK] sat the cat"]

    def made(auto):
        return auto.from_config(config).eval()

    model = made(transformers.AutoModelForMaskedLM)
    filled = transformers.pipeline("fill-mask", model=model, tokenizer=words)(texts, batch_size=2, top_k=1)
    for text, (best,) in zip(texts, filled, strict=True):
        ids = words(text, return_tensors="pt")["input_ids"]
        p = model.model(ids).logits[0, 2].softmax(-1).detach()
        assert best["token"] == p.argmax()
        assert best["score"] == pytest.approx(float(p.max()), rel=1e-5)
    base = made(transformers.AutoModel)
    features = transformers.pipeline("feature-extraction", model=base, tokenizer=words)(texts[0])
    hidden = base.model.encode(words(texts[0], return_tensors="pt")["input_ids"])[0]
    torch.testing.assert_close(torch.tensor(features), hidden, rtol=1e-5, atol=1e-5)
    judge = transformers.pipeline(
        "text-classification", model=made(transformers.AutoModelForSequenceClassification), tokenizer=words
    )
    both = judge(texts, batch_size=2)
    assert [one["label"] for one in both] == [judge(text)[0]["label"] for text in texts]


def test_layers_stay_whole_on_several_devices():
    accelerate = pytest.importorskip("accelerate")
    model = causal()
    size = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    where = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": 2 * size, "disk": 10 * size},
        no_split_module_classes=model._no_split_modules,
    )
    assert len(set(where.values())) == 2
    assert all(name in ("model.embedding", "model.norm") or name.count(".") == 2 for name in where)


def test_pipeline():
    words = tokenizer()
    model = causal(vocab_size=len(WORDS), pad_token_id=words.pad_token_id)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=words)
    texts = ["the cat sat on", "dog"]
    made = generate(texts, max_new_tokens=4, do_sample=False, batch_size=2, return_tensors=True)
    for text, row in zip(texts, made, strict=True):
        ids = words(text, return_tensors="pt")["input_ids"]
        wanted = model.model.generate(ids, 4)[0].tolist()
        assert row[0]["generated_token_ids"][-len(wanted) :] == wanted
    assert generate("the cat", max_new_tokens=2)[0]["generated_text"].startswith("the cat")


def test_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    words = tokenizer()
    ids = words("the cat sat on a mat and the dog sat on a log . " * 2)["input_ids"]
    data = [{"input_ids": ids, "labels": ids}] * 16
    torch.manual_seed(0)
    config = hf.DecoderLMConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, mixers=HYBRID[1:]
    )
    trainer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_config(config),
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=60,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data,
        eval_dataset=data[:2],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.3 * losses[0]
    trainer.save_model(str(tmp_path / "last"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    given = torch.tensor([ids[:6]])
    assert words.decode(again.generate(given, max_new_tokens=3, do_sample=False)[0][6:]) == "and the dog"
