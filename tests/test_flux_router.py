"""Layer routers on frozen Llama and Qwen models."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

import heedful.hf
from heedful.convert.flux_router import add_flux_router, train_flux_router
from heedful.routing.layer_router import streaming_blocks

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {"llama": LlamaConfig(**SMALL), "qwen3": Qwen3Config(**SMALL, head_dim=16)}
BRANCH = {"block_size": 2, "sink_blocks": 1, "local_blocks": 2, "pool": 3}


def decoder(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention is far from uniform
    return model


def ids(rows: int = 2, tokens: int = 15) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 40, (rows, tokens))


def force(routers, decisions) -> None:
    """Let each router decide the same whatever it sees."""
    with torch.no_grad():
        for router, full in zip(routers.routers, decisions, strict=True):
            router.head[-1].weight.zero_()
            router.head[-1].bias.copy_(torch.tensor([0.0, 1.0] if full else [1.0, 0.0]))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    # float64, but rotary angles and norms of transformers are float32
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_at_the_start_every_layer_is_full(name):
    model = decoder(name)
    wanted = model(ids()).logits
    made = model.generate(ids(), max_new_tokens=5, do_sample=False)
    routers = add_flux_router(model, **BRANCH)
    same(model(ids()).logits, wanted)
    assert all(full.eq(1).all() for full in routers.full)
    assert torch.equal(model.generate(ids(), max_new_tokens=5, do_sample=False), made)
    head = 16 if name == "qwen3" else 8
    count = sum(p.numel() for p in routers.routers[0].parameters())
    assert (
        count
        == sum(a * b + b for a, b in ((1, 8), (8, 2), (2, 4), (4, 1)) for a, b in ((a * head, b * head),))
        + 2 * head
        + 2
    )
    assert not any(p.requires_grad for n, p in model.named_parameters() if "flux_router" not in n)
    routers.remove()
    assert torch.equal(model(ids()).logits, wanted)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("flux" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_layers_see_sinks_and_their_window(name):
    model = decoder(name)
    model.set_attn_implementation("heedful")
    full = model(ids()).logits
    sparse = streaming_blocks(2, 1, 2)
    decisions = [False, True, False]
    with heedful.hf.use_pattern({0: sparse, 2: sparse}):
        wanted = model(ids()).logits
        made = model.generate(ids(), max_new_tokens=6, do_sample=False)
    routers = add_flux_router(model, **BRANCH)
    force(routers, decisions)
    same(model(ids()).logits, wanted)
    assert (wanted - full).abs().max() > 1e-3
    assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False), made)
    beams = model.generate(ids(), max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (2, 19)
    # Up to (1 + 2) blocks of 2 tokens both branches are one.
    same(model(ids(tokens=6)).logits, full_of(model, routers, ids(tokens=6)))
    # In training mode both branches are computed; the forward is that of the drawn decisions.
    force(routers, [False] * 3)
    with torch.no_grad():
        for router in routers.routers:
            router.train().head[-1].bias.copy_(torch.tensor([99.0, 0.0]))
    trained = model(ids()).logits
    for router in routers.routers:
        router.eval()
    same(trained, model(ids()).logits)


def full_of(model, routers, tokens) -> torch.Tensor:
    force(routers, [True] * 3)
    logits = model(tokens).logits
    force(routers, [False] * 3)
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_router_looks_at_the_ends_before_rotation(name):
    model, seen = decoder(name), []
    routers = add_flux_router(model, **BRANCH)
    routers.routers[0].register_forward_pre_hook(lambda router, given: seen.append(given[0]))
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    model(tokens, attention_mask=mask)
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    query = attention.q_proj(hidden).unflatten(-1, (4, -1))
    if name == "qwen3":
        query = attention.q_norm(query)
    for row, start in ((0, 0), (1, 4)):
        ends = torch.cat([query[row, start : start + 3], query[row, -3:]])
        same(seen[0][row], ends.mean((0, 1)))
    with routers.pooling(torch.arange(15).expand(2, -1) < 7):
        model(tokens)
    same(seen[1][0], torch.cat([query[0, :3], query[0, 4:7]]).mean((0, 1)))


def test_the_prompt_decides_for_what_follows():
    model = decoder("llama")
    routers = add_flux_router(model, **BRANCH)
    torch.manual_seed(3)
    with torch.no_grad():
        for router in routers.routers:
            router.head[-1].weight.normal_()
            router.head[-1].bias.zero_()
            for layer in router.features[::2]:
                layer.weight.mul_(8)
    tokens = ids(6)
    made = model.generate(tokens, max_new_tokens=6, do_sample=False)
    decided = torch.stack(routers.full)
    assert 0 < decided.mean() < 1 and not decided.eq(decided[:, :1]).all()
    for row in range(6):
        alone = model.generate(tokens[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0], made[row])
        assert torch.equal(torch.stack(routers.full)[:, 0], decided[:, row])
    # By full passes with these decisions.
    sequence = tokens[:1]
    force(routers, decided[:, 0].bool().tolist())
    for _ in range(6):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(sequence[0], made[0])


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_only_the_routers_learn(target):
    model = decoder("llama")
    routers = add_flux_router(model, **BRANCH)
    with torch.no_grad():
        for router in routers.routers:
            router.head[-1].bias.copy_(torch.tensor([0.0, 0.5]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = ids(4)
    batch = {"input_ids": tokens, "labels": tokens, "pool_mask": torch.arange(15).expand(4, -1) < 12}
    history = train_flux_router(
        routers, [batch], steps=40, targets=[target], lr=0.02, multiplier_lr=0.1, progress=False
    )
    assert len(history) == 40 and all(h["loss"] > 0 for h in history)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("flux_router" in name), name
    assert not any(router.training for router in routers.routers)
    model(tokens)
    full = torch.stack(routers.full).mean()
    assert abs(full - (1 - target)) < 0.1


def test_sliding_layers_keep_their_window():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=4))
    with pytest.raises(ValueError, match="has no full attention of the Llama kind"):
        add_flux_router(model)


def test_what_cannot_be_routed_is_refused():
    small = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    with pytest.raises(ValueError, match="model is a GPTNeoXForCausalLM, which has no full attention"):
        add_flux_router(AutoModelForCausalLM.from_config(GPTNeoXConfig(**small)))
    model = decoder("llama")
    cache = model(ids()).past_key_values
    routers = add_flux_router(model, **BRANCH)
    with pytest.raises(ValueError, match="model has routers, must have none"):
        add_flux_router(model)
    with pytest.raises(ValueError, match="a text whose start these routers have not seen"):
        model(ids()[:, :1], past_key_values=cache)
    routers.remove()
    add_flux_router(model, **BRANCH).remove()


def test_a_copy_has_routers_of_its_own():
    model = decoder("llama")
    routers = add_flux_router(model, **BRANCH)
    force(routers, [False] * 3)
    wanted = model(ids()).logits
    other = copy.deepcopy(model)
    force(routers, [True] * 3)
    same(other(ids()).logits, wanted)
    assert routers.full[0].eq(0).all()  # not moved by the copy


@pytest.mark.door
def test_errors():
    model = decoder("llama")
    for call, message in (
        (lambda: add_flux_router(model, pool=0), "pool is 0"),
        (lambda: add_flux_router(model, sink_blocks=0), "sink_blocks is 0"),
        (lambda: add_flux_router(torch.nn.Linear(2, 2)), "model is a Linear, must be a transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
