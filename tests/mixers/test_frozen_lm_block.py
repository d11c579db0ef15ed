"""Frozen LM block: a transcription, what learns, the same as a Llama layer, counts, authors' names."""

from __future__ import annotations

import pytest
import torch

from heedful import authors
from heedful.mixers.heads.frozen_lm_block import FrozenLMBlock, LMBlock
from heedful.models.vit_lm_block import ViTWithLMBlock
from heedful.testing.check_backbone import image, make


def build(**how):
    torch.manual_seed(0)
    mixer = FrozenLMBlock(6, **{"lm_dim": 12, "heads": 3, "hidden": 7, "layers": 2, **how}).double()
    for p in mixer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return mixer


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def transcribed(mixer, x, seen):
    """Tokens (n, c), those of `seen` as keys."""
    x = x @ mixer.enter.weight.T
    for block in mixer.blocks:
        u = rms(x, block.norm1)
        q, k, v = u @ block.query.weight.T, u @ block.key.weight.T, u @ block.value.weight.T
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(3):
                own = slice(4 * h, 4 * h + 4)
                weights = torch.stack([(q[i, own] @ k[j, own] / 2).exp() for j in seen])
                heads.append((weights[:, None] * v[seen, own]).sum(0) / weights.sum())
            rows.append(block.out.weight @ torch.cat(heads))
        x = x + torch.stack(rows)
        u = rms(x, block.norm2)
        gate = u @ block.mlp.gate.weight.T
        x = x + (gate / (1 + (-gate).exp()) * (u @ block.mlp.up.weight.T)) @ block.mlp.down.weight.T
    return rms(x, mixer.norm) @ mixer.leave.weight.T


def test_equals_transcription():
    mixer = build()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    expected = torch.stack([transcribed(mixer, x[0], [0, 1, 2, 3, 4]), transcribed(mixer, x[1], [0, 2, 3])])
    y = mixer(x, mask=mask)
    torch.testing.assert_close(y, expected)
    leaves = [x, mixer.enter.weight, mixer.leave.weight]
    weight = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_what_learns():
    names = {n for n, p in build().named_parameters() if p.requires_grad}
    assert names == {"enter.weight", "leave.weight"}
    assert all(p.requires_grad for p in build(frozen=False).parameters())


def test_counts():
    with torch.device("meta"):
        for width, wanted in ((192, 1_572_864), (384, 3_145_728), (768, 6_291_456)):
            mixer = FrozenLMBlock(width)
            frozen = sum(p.numel() for p in mixer.parameters() if not p.requires_grad)
            assert frozen == 202_383_360 + 4096
            assert sum(p.numel() for p in mixer.parameters() if p.requires_grad) == wanted
    grouped = LMBlock(12, heads=6, kv_heads=2, hidden=5)
    assert sum(p.numel() for p in grouped.parameters()) == 2 * 144 + 2 * 48 + 3 * 60 + 24


def test_the_order_of_tokens_is_free():
    mixer = build()
    x, order = torch.randn(1, 5, 6, dtype=torch.float64), [3, 1, 4, 0, 2]
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order])


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_taken_out_of_a_language_model(kind):
    transformers = pytest.importorskip("transformers")
    from heedful.convert import frozen_lm_block

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        num_hidden_layers=3,
        vocab_size=8,
        rms_norm_eps=1e-5,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    x = torch.randn(2, 5, 24)
    turned = (torch.ones(1, 5, 6), torch.zeros(1, 5, 6))  # every token at position 0
    for layer in (1, -1):
        made = frozen_lm_block(model, 16, layer=layer)
        # A mask of zeros hides nothing; without one the layer would be causal.
        wanted = model.model.layers[layer](
            x, attention_mask=torch.zeros(2, 1, 5, 5), position_embeddings=turned
        )
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        torch.testing.assert_close(made.blocks[0](x), wanted)
        assert made.norm.eps == 1e-5 and torch.equal(made.norm.weight, torch.ones(24))
        assert made(torch.randn(1, 3, 16)).shape == (1, 3, 16)
        made.blocks[0].query.weight.data.zero_()  # a copy
        assert model.model.layers[layer].self_attn.q_proj.weight.any()


def test_models_it_cannot_be_taken_from():
    transformers = pytest.importorskip("transformers")
    from heedful.convert import frozen_lm_block

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 20, "num_hidden_layers": 1}
    qwen = transformers.Qwen2Model(transformers.Qwen2Config(vocab_size=8, num_key_value_heads=2, **sizes))
    with pytest.raises(ValueError, match=r"layers differ in self_attn.k_proj.bias"):
        frozen_lm_block(qwen, 16)
    with pytest.raises(ValueError, match="BertModel, must be a language model of the Llama kind"):
        frozen_lm_block(transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes)), 16)


def test_the_vision_transformer_ends_in_it():
    model = make(ViTWithLMBlock)
    x = image(model, size=(48, 48))
    seen = []
    model.lm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    y = model(x)
    tokens = model.lm(seen[0])[:, 0]
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (
        tokens.var(-1, correction=0, keepdim=True) + 1e-6
    ).sqrt()
    torch.testing.assert_close(y, model.head(tokens * model.norm.weight + model.norm.bias))
    torch.testing.assert_close(model.features(x)[0].flatten(2).mT, model.lm(seen[0])[:, 1:])
    frozen = ViTWithLMBlock(**{**ViTWithLMBlock.example, "frozen": True})
    still = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert still == {n for n, _ in frozen.named_parameters() if n.startswith(("lm.blocks", "lm.norm"))}


NAMES = (
    ("lm.enter", "llama_dim_mapper1"),
    ("lm.leave", "llama_dim_mapper2"),
    ("lm.norm", "llama.norm"),
    ("lm.blocks.0.query", "llama.layers.0.attention.wq"),
    ("lm.blocks.0.key", "llama.layers.0.attention.wk"),
    ("lm.blocks.0.value", "llama.layers.0.attention.wv"),
    ("lm.blocks.0.out", "llama.layers.0.attention.wo"),
    ("lm.blocks.0.mlp.gate", "llama.layers.0.feed_forward.w1"),
    ("lm.blocks.0.mlp.down", "llama.layers.0.feed_forward.w2"),
    ("lm.blocks.0.mlp.up", "llama.layers.0.feed_forward.w3"),
    ("lm.blocks.0.norm1", "llama.layers.0.attention_norm"),
    ("lm.blocks.0.norm2", "llama.layers.0.ffn_norm"),
    ("class_token", "cls_token"),
    ("positions", "pos_embed"),
    ("embed", "patch_embed.proj"),
)


def test_authors_names():
    model = make(ViTWithLMBlock)
    theirs = {}
    for name, value in model.state_dict().items():
        ours, told = next((pair for pair in NAMES if name.startswith(pair[0])), ("", ""))
        theirs[told + name.removeprefix(ours).replace(".mixer.", ".attn.")] = value
    other = authors.load(ViTWithLMBlock(**{**ViTWithLMBlock.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))


@pytest.mark.door
def test_errors():
    for how, message in (
        ({"heads": 5}, "heads is 5, must divide lm_dim"),
        ({"kv_heads": 2}, "kv_heads is 2, must divide heads"),
        ({"lm_dim": 0}, "lm_dim is 0"),
        ({"layers": 0}, "layers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**how)
