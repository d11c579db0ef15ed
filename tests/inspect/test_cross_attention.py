"""Saliency by occlusion of a speech model, and its cross-attention beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as hf

from heedful import inspect as look


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 3,
    }
    config = hf.WhisperConfig(
        **sizes, vocab_size=40, num_mel_bins=8, d_model=12, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, init_std=0.3,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    return model, torch.randn(20, 8), torch.tensor([3, 7, 9, 11, 5])


def test_saliency_by_loops():
    torch.manual_seed(0)
    scores, masks = torch.rand(9, 4), torch.rand(9, 3, 2) < 0.5
    masks[:, 1, 1] = True  # never occluded
    found = look.PerturbationSaliency()
    found.add(scores[:5], masks[:5])
    found.add(scores[5:], masks[5:])
    for i in range(4):
        for t in range(3):
            for c in range(2):
                gone = [scores[m, i].item() for m in range(9) if not masks[m, t, c]]
                wanted = sum(gone) / len(gone) if gone else 0.0
                assert found.saliency[i, t, c].item() == pytest.approx(wanted, abs=1e-6)


def test_divergence():
    before, after = torch.randn(3, 6).softmax(-1), torch.randn(2, 3, 6).softmax(-1)
    found = look.token_divergence(before, after)
    for k in range(2):
        for i in range(3):
            terms = [
                p * math.log(p / q) for p, q in zip(before[i].tolist(), after[k, i].tolist(), strict=True)
            ]
            assert found[k, i].item() == pytest.approx(sum(terms), abs=1e-6)
    assert (found > 0).all() and not look.token_divergence(before, before[None]).any()
    one, other = torch.eye(2)[:1], torch.eye(2)[1:]
    assert look.token_divergence(one, other[None]).item() == pytest.approx(-math.log(2.0**-126))


def test_normalisation():
    torch.manual_seed(0)
    maps = look.SpeechSaliency(torch.rand(4, 5, 3), torch.rand(4, 4).tril())
    standard = maps.standardised()
    flat = standard.features.flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.std(1), torch.ones(4))
    assert standard.tokens[0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(standard.tokens[3].std(), torch.tensor(1.0))
    torch.testing.assert_close(standard.tokens[2, :3].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    final = standard.joint_min_max()
    for i in range(4):
        both = [*final.features[i].flatten().tolist(), *final.tokens[i, : i + 1].tolist()]
        assert min(both) == 0 and max(both) == pytest.approx(1)
        assert not final.tokens[i, i + 1 :].any()
    same = look.SpeechSaliency(torch.full((2, 3), 0.1), torch.zeros(2, 2)).standardised()
    assert not same.features.any() and not same.joint_min_max().features.any()


def test_segments_and_masks():
    picture = torch.zeros(30, 40)
    picture[:, 20:] = 1
    label = look.slic(picture, 12)
    assert label.shape == (30, 40) and 8 <= int(label.max()) + 1 <= 14
    assert not set(label[:, :18].unique().tolist()) & set(label[:, 22:].unique().tolist())
    alone = look.slic(torch.rand(6, 5), 1)
    assert not alone.any()
    flat = look.slic(torch.zeros(20, 20), 4)  # nothing but places
    assert sorted(torch.bincount(flat.flatten()).tolist()) == [100, 100, 100, 100]

    divisions = look.spectrogram_segments(torch.randn(100, 16), (100, 300), reference=500)
    counts = [int(d.max()) + 1 for d in divisions]
    assert 10 <= counts[0] <= 30 and 40 <= counts[1] <= 80  # 100 and 300 in 500 frames are 20 and 60 in 100
    masks = torch.cat(list(look.segment_masks(divisions, 400, batch=64)))
    assert masks.shape == (400, 100, 16) and abs(masks.float().mean().item() - 0.5) < 0.05
    for mask, division in ((masks[0], divisions[0]), (masks[-1], divisions[1])):
        for segment in division.unique():
            assert len(mask[division == segment].unique()) == 1


def test_the_frame_that_matters_is_found():
    x = torch.ones(6, 2)

    def predict(inputs, kept):
        """The first token hangs on frame 2, the second on the token before it."""
        on = inputs[:, 2].sum(-1)
        before = kept[:, 0].float() * 2 if kept.shape[1] else torch.full((len(inputs),), 2.0)
        return torch.stack([torch.stack([y, 0 * y], -1) for y in (on, before)], 1).softmax(-1)

    frames = torch.arange(6)[:, None]
    found = look.perturbation_saliency(predict, x, look.segment_masks([frames], 2000), token_p=0.5)
    change = look.token_divergence(torch.tensor([[2.0, 0]]).softmax(-1), torch.full((1, 1, 2), 0.5)).item()
    assert found.features.shape == (2, 6, 1) and found.tokens.shape == (2, 2)
    assert found.features[0, 2, 0].item() == pytest.approx(change, rel=1e-5)  # always hurt
    others = found.features[0, [0, 1, 3, 4, 5], 0] / change
    assert (others - 0.5).abs().max() < 0.06  # hurt in half of the runs: chance is not 0
    assert found.tokens[1, 0].item() == pytest.approx(change, rel=1e-5) and found.tokens[0, 1] == 0


def test_forced_decoding_is_the_models_own(whisper):
    model, x, ids = whisper
    with torch.no_grad():
        out = model(input_features=x.T[None], decoder_input_ids=ids[None], output_attentions=True)
        wanted = out.logits.softmax(-1)
        everything = torch.ones(1, 0, dtype=torch.bool)
        torch.testing.assert_close(look.speech_predictor(model, ids)(x[None], everything), wanted)
        state = out.encoder_last_hidden_state
        predict = look.speech_predictor(model, ids, from_encoder=True)
        torch.testing.assert_close(predict(state, torch.ones(1, 5, dtype=torch.bool)), wanted)
        changed = predict(state, torch.arange(5)[None] != 2)[0] - wanted[0]
    assert changed[:2].abs().max() < 1e-6 < 1e-4 < changed[2:].abs().amax(-1).min()
    eager = hf.WhisperForConditionalGeneration(model.config)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        told = eager.eval()(input_features=x.T[None], decoder_input_ids=ids[None], output_attentions=True)
    attention = look.cross_attention(model, x, ids)
    assert attention.shape == (2, 3, 5, 10)
    torch.testing.assert_close(attention, torch.cat(told.cross_attentions), rtol=1e-4, atol=1e-5)


def test_saliency_and_attention_of_a_model(whisper):
    model, x, ids = whisper
    segments = look.spectrogram_segments(x, (100, 200), reference=100)
    found = look.perturbation_saliency(
        look.speech_predictor(model, ids), x, look.segment_masks(segments, 60), token_p=0.3
    )
    assert found.features.shape == (5, 20, 8) and found.tokens.shape == (5, 5)
    assert (found.features >= 0).all() and found.features.max() > 0
    maps = found.standardised().joint_min_max()
    attention = look.cross_attention(model, x, ids)
    agreement = look.cross_attention_agreement(attention, maps.features)
    assert agreement.heads.shape == (2, 3) and agreement.heads.abs().max() <= 1
    with torch.no_grad():
        state = model.get_encoder()(x.T[None])[0][0]
    inner = look.perturbation_saliency(
        look.speech_predictor(model, ids, from_encoder=True),
        state,
        look.segment_masks([torch.arange(10)[:, None]], 40),
    )
    assert inner.features.shape == (5, 10, 1) and not inner.tokens.any()
    look.cross_attention_agreement(attention, inner.features.squeeze(-1))


def test_agreement_by_loops():
    torch.manual_seed(0)
    attention, saliency = torch.rand(2, 3, 4, 5).softmax(-1), torch.rand(4, 20, 6)
    for reduce in ("mean", "max"):
        over = saliency.mean(-1) if reduce == "mean" else saliency.amax(-1)
        spans = torch.stack([over[:, 4 * s : 4 * s + 4].mean(1) for s in range(5)], dim=1)[:, :4]
        found = look.cross_attention_agreement(attention, saliency, reduce=reduce, valid=4)

        def correlation(table, spans=spans):
            return np.corrcoef(table[:, :4].flatten(), spans.flatten())[0, 1]

        for layer in range(2):
            for head in range(3):
                wanted = correlation(attention[layer, head])
                assert found.heads[layer, head].item() == pytest.approx(wanted, abs=1e-6)
            assert found.layers[layer].item() == pytest.approx(
                correlation(attention[layer].mean(0)), abs=1e-6
            )
        assert found.overall == pytest.approx(correlation(attention.mean((0, 1))), abs=1e-6)


@pytest.mark.door
def test_errors_at_the_door():
    with pytest.raises(ValueError, match="before the first call of add"):
        _ = look.PerturbationSaliency().saliency
    with pytest.raises(ValueError, match="p is 1, must lie between 0 and 1"):
        next(look.segment_masks([torch.zeros(2, 2, dtype=torch.long)], 3, p=1))
    with pytest.raises(ValueError, match="segments is 0"):
        look.slic(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match=r"must be \(4, frames, channels\) with 5 frames or more"):
        look.cross_attention_agreement(torch.zeros(1, 1, 4, 5), torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="reduce is 'sum'"):
        look.saliency_by_frame(torch.zeros(1, 2, 2), 2, reduce="sum")
