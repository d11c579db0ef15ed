"""MoH-ViT: the frame of TransNeXt around gated heads."""

from __future__ import annotations

import re

import pytest
import torch

from heedful import authors
from heedful.mixers.heads.moh_vit import MixtureOfHeadAggregatedAttention, MixtureOfHeadVisionAttention
from heedful.models.moh_transnext import MoHTransNeXt
from heedful.testing.check_backbone import image, make


def test_stages_have_their_heads():
    model = MoHTransNeXt(**MoHTransNeXt.example)
    mixers = [stage[0].mixer for stage in model.stages]
    assert [type(m) for m in mixers] == [MixtureOfHeadAggregatedAttention] * 3 + [
        MixtureOfHeadVisionAttention
    ]
    assert [(m.gate.shared, m.gate.routed) for m in mixers] == [(2, 0), (2, 2), (1, 2), (2, 2)]
    assert [m.pool_ratio for m in mixers[:3]] == [8, 4, 2]


def test_losses_of_balance_add_to_a_hundredth_of_their_mean():
    model = make(MoHTransNeXt).train()
    model(image(model))
    losses = [m.aux_losses["load_balance"] for m in model.modules() if getattr(m, "aux_losses", None)]
    assert len(losses) == 3
    weights = [m.load_balance for m in model.modules() if hasattr(m, "load_balance")]
    assert weights == pytest.approx([0.01 / 3] * 4)


def test_authors_names():
    model = make(MoHTransNeXt)
    names = (
        (r"downsample\.(\d)", lambda m: f"patch_embed{int(m[1]) + 1}"),
        (r"norms\.(\d)", lambda m: f"norm{int(m[1]) + 1}"),
        (r"stages\.(\d)", lambda m: f"block{int(m[1]) + 1}"),
        (r"mlp\.dwconv", "mlp.dwconv.dwconv"),
        (r"mixer\.gate\.route", "attn.wg"),
        (r"mixer\.gate\.share", "attn.wg_1"),
        (r"mixer\.gate\.balance", "attn.wg_0"),
        (r"mixer\.query\.", "attn.q."),
        (r"mixer\.reduce", "attn.sr"),
        (r"mixer\.local_bias", "attn.relative_pos_bias_local"),
        (r"mixer\.tokens", "attn.learnable_tokens"),
        (r"mixer\.token_bias", "attn.learnable_bias"),
        (r"mixer\.position_in", "attn.cpb_fc1"),
        (r"mixer\.position_out", "attn.cpb_fc2"),
        (r"mixer\.", "attn."),
    )
    theirs = {}
    for name, value in model.state_dict().items():
        new = name
        for pattern, replacement in names:
            new = re.sub(pattern, replacement, new)
        theirs[new] = value[:, :, None, None] if new.endswith("sr.weight") else value
    other = MoHTransNeXt(**{**MoHTransNeXt.example, "classes": 3}).double()
    authors.load(other, theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"shared_heads is \(1,\), must have 4 entries, one for each stage"):
        MoHTransNeXt(shared_heads=(1,))
