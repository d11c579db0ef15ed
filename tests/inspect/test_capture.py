"""Capture sees the weights that models compute, whatever they are made of, in bounded memory."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import timm
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
from heedful import patterns as p
from heedful.inspect import Site, attention_distance, capture
from heedful.nn import MultiheadAttention
from tests.test_tap import FAMILIES, made

IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


class Record:
    def __init__(self):
        self.sites: list[tuple[str, int, bool]] = []
        self.weights: list[torch.Tensor] = []

    def __call__(self, site: Site) -> None:
        self.sites.append((site.name, site.layer, site.cross))
        pieces = [site.weights(rows) for rows in site.pieces(40)]
        self.weights.append(torch.cat(pieces, dim=2))
        assert torch.equal(self.weights[-1], site.weights())


def same(found, wanted):
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-6)  # float32


@contextmanager
def largest():
    """The largest tensor that any operation gives, in entries."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.most = max(self.most, x.untyped_storage().nbytes() // 4)
            return out

    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("family", FAMILIES)
def test_text_models_with_padding(family):
    model, inputs = made(family)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    record = Record()
    with torch.no_grad():
        wanted = eager(**inputs, output_attentions=True)
        with capture(model, record):
            model(**inputs)
    valid = inputs["attention_mask"].bool()
    for found, own in zip(record.weights, wanted.attentions, strict=True):
        rows = valid[:, None, :, None].expand_as(own)
        same([found[rows]], [own[rows]])


def test_images_and_two_towers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    vit = hf.ViTModel(hf.ViTConfig(**IMAGE)).eval()
    text = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    clip = hf.CLIPModel(
        hf.CLIPConfig(text_config={**text, "intermediate_size": 24}, vision_config=IMAGE, projection_dim=8)
    ).eval()
    ids = torch.randint(3, 31, (2, 6))
    for model, inputs in ((vit, {"pixel_values": x}), (clip, {"input_ids": ids, "pixel_values": x})):
        record = Record()
        with torch.no_grad(), capture(model, record):
            model(**inputs)
        same(record.weights, own_weights(model, inputs))


def own_weights(model, inputs):
    """What the attention modules of a copy with eager attention give back."""
    eager, own = copy.deepcopy(model), []
    eager.set_attn_implementation("eager")
    for module in eager.modules():
        if type(module).__name__ in ("ViTAttention", "CLIPAttention"):
            module.register_forward_hook(lambda m, a, out: own.append(out[1]))
    with torch.no_grad():
        eager(**inputs)
    return own


def test_whispers_cross_attention():
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=31, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4,
        max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = hf.WhisperModel(config).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.randint(3, 31, (2, 5))}
    record = Record()
    with torch.no_grad():
        wanted = eager(**inputs, output_attentions=True)
        with capture(model, record):
            model(**inputs)
    cross = [w for w, (_, _, cross) in zip(record.weights, record.sites, strict=True) if cross]
    rest = [w for w, (_, _, cross) in zip(record.weights, record.sites, strict=True) if not cross]
    same(cross, wanted.cross_attentions)
    same(rest, [*wanted.encoder_attentions, *wanted.decoder_attentions])


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=3).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    own = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda m, a, out: own.append(out))
    x = torch.randn(2, 3, 32, 32)
    record = Record()
    with torch.no_grad():
        wanted = model(x)
        for block in model.blocks:
            block.attn.fused_attn = fused
        with capture(model, record):
            inside = model(x)
    same(record.weights, own)
    same([inside], [wanted])
    assert record.sites == [("blocks.0.attn", 0, False), ("blocks.1.attn", 1, False)]
    assert all(block.attn.fused_attn is fused for block in model.blocks)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MultiheadAttention])
@pytest.mark.parametrize("extra", [False, True])
def test_multihead_attention(kind, extra):
    torch.manual_seed(0)
    mixer = kind(12, 3, batch_first=extra, add_bias_kv=extra, add_zero_attn=extra).eval()
    x, y = torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.rand(4, 6) > 0.9
    a, b = (x, y) if extra else (x.transpose(0, 1), y.transpose(0, 1))
    for need in (True, False):
        record = Record()
        with torch.no_grad(), capture(mixer, record):
            mixer(a, b, b, key_padding_mask=padding, attn_mask=mask, need_weights=need)
        _, own = mixer(a, b, b, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False)
        same(record.weights, [own])
        assert record.sites == [("", 0, True)]


def test_torchs_encoder_takes_no_short_cut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 12)
    record = Record()
    with torch.no_grad():
        wanted = model(x)
        with capture(model, record):
            inside = model(x)
    same([inside], [wanted])
    assert [name for name, _, _ in record.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    same([record.weights[0]], [model.layers[0].self_attn(x, x, x, average_attn_weights=False)[1]])


def test_heedfuls_mixers_and_selections():
    torch.manual_seed(0)
    mixer = heedful.create("dense", 12, heads=3, causal=True).eval()
    record = Record()
    with torch.no_grad(), capture(mixer, record):
        mixer(torch.randn(2, 7, 12))
    assert len(record.weights) == 1 and record.weights[0].shape == (2, 3, 7, 7)
    assert not record.weights[0].triu(1).any()

    class Attends(nn.Module):
        def forward(self, q, k, v, **how):
            return heedful.attention(q, k, v, **how)

    q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    window = p.Window(2, 1)
    groups = p.Neighborhood((3, 3), 3).groups(9, 9, 0, torch.device("cpu"))
    assert groups is not None
    for pattern in (window, window.block_table(9, 9, block_size=(4, 4)), groups):
        model, record = Attends(), Record()
        with capture(model, record):
            out = model(q, k, v, pattern=pattern)
        torch.testing.assert_close(record.weights[0] @ v, out, rtol=1e-4, atol=1e-5)  # float32
        assert len(record.weights) == 1


def test_one_model_inside_another():
    encoder, inputs = made("bert")

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.mix = encoder, nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, **inputs):
            x = self.encoder(**inputs)[0]
            return self.mix(x, x, x)[0]

    model = Pooled().eval()
    record = Record()
    with torch.no_grad(), capture(model, record):
        model(**inputs)
    assert [name for name, _, _ in record.sites] == [
        "encoder.encoder.layer.0.attention.self",
        "encoder.encoder.layer.1.attention.self",
        "mix",
    ]


def test_long_inputs_in_bounded_memory():
    torch.manual_seed(0)
    n = 32768  # a table of all weights would have 2^31 entries for two heads
    model, _ = made("mistral")
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    ids = torch.randint(0, 31, (1, n))
    means = []

    def see(site: Site) -> None:
        pieces = [*site.pieces(1 << 20)]
        assert pieces[-1].stop == n
        for rows in pieces[:: len(pieces) // 4]:
            means.append(attention_distance(site.weights(rows), queries=site.query_positions(rows)).mean())

    with torch.no_grad(), largest() as seen, capture(model.model, see):
        model.model(ids)
    assert seen.most <= 1 << 23
    assert len(means) >= 4 and all(0 < m <= 2 for m in means)  # the model's window


def test_a_model_without_attention_is_told():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="no attention call of Linear was seen"), capture(model, print):
        model(torch.zeros(1, 2))
