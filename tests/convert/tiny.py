"""Small random Hugging Face models, and what tests of conversions ask of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "initializer_range": 0.2,  # wide, so that attention is far from uniform
}


def tiny(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """A model in eval mode; biases and norms are random too."""
    torch.manual_seed(0)
    kv = {} if kind in ("Bert", "Roberta", "Electra") else {"num_key_value_heads": 6}
    if kind == "Qwen3":
        kv["head_dim"] = 8
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **kv, **changes})
    name = f"{kind}Model" if kind in ("Bert", "Roberta", "Electra") else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def texts(batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids; the first row is shorter, padded on the left."""
    ids = torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outcome(model: transformers.PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states of the real tokens."""
    inputs = inputs or texts()
    out = model(**inputs)
    real = inputs["attention_mask"].bool()
    return (out.logits if "logits" in out else out.last_hidden_state)[real]


@torch.no_grad()
def cache_bytes(model: transformers.PreTrainedModel, tokens: int = 7) -> int:
    """Bytes that the cache of one text holds for each of its tokens."""
    ids = torch.arange(3, 3 + tokens)[None]
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    return held // tokens


@torch.no_grad()
def stepwise(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Logits of the real tokens, of a prefill of 4 and single steps through the cache."""
    inputs = texts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, rows = None, []
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, ids.shape[1]))):
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:end]
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        rows.append(out.logits)
    return torch.cat(rows, dim=1)[mask.bool()]


@torch.no_grad()
def whole(model: transformers.PreTrainedModel) -> torch.Tensor:
    """The same in one pass."""
    inputs = texts()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=positions).logits[inputs["attention_mask"].bool()]


def check_decodes(model: transformers.PreTrainedModel, path: Any, *, static: bool = True) -> None:
    """Pieces equal the whole, it generates greedily and with beams, and it comes back from a folder."""
    torch.testing.assert_close(stepwise(model), whole(model), rtol=2e-4, atol=2e-4)
    ids = texts(1, 5)["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with_cache = model.generate(ids, **options)
    assert with_cache.shape == (1, 9)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    if static:
        assert torch.equal(with_cache, model.generate(ids, cache_implementation="static", **options))
    assert model.generate(ids, num_beams=2, **options).shape == (1, 9)
    check_loads(model, path)


def check_loads(model: transformers.PreTrainedModel, path: Any) -> None:
    """What is saved comes back."""
    from heedful.convert import load

    model.save_pretrained(path)
    again = load(path)
    assert type(again) is type(model)
    assert torch.equal(outcome(again), outcome(model))
