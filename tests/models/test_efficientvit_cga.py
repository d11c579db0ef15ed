"""EfficientViT's own facts; the model equals the authors' golden file (tests/parity)."""

from __future__ import annotations

import pytest
import torch

from heedful import authors
from heedful.models.efficientvit_cga import EfficientViT


def small(**how: object) -> EfficientViT:
    torch.manual_seed(0)
    return EfficientViT(**{**EfficientViT.example, **how}).eval()


def mixers(model: EfficientViT) -> list:
    return [stage[-1].mixer.module for stage in model.stages]


def test_tables_are_as_large_as_windows_or_maps() -> None:
    model = EfficientViT(classes=2)
    assert [m.attention_biases.shape for m in mixers(model)] == [(4, 49), (4, 49), (4, 16)]
    assert [m.window for m in mixers(small(image_size=64))] == [4, 2, 1]


def test_blocks_are_a_sandwich_of_residuals() -> None:
    block = small().stages[0][-1]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = y = torch.randn(2, 8, 5, 6)
    for name in ("dw0", "ffn0", "mixer", "dw1", "ffn1"):
        y = y + getattr(block, name).module(y)
    torch.testing.assert_close(block(x), y)


def test_the_head_sees_the_normed_mean() -> None:
    model = small()
    model.norm.running_mean.normal_()
    x = torch.randn(2, 3, 128, 128)
    mean = model.features(x)[-1].mean((2, 3))
    norm = model.norm
    normed = (mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(model(x), model.head(normed))


def test_matrices_are_taken_for_convolutions() -> None:
    model = small()
    theirs = {
        "blocks1.0.ffn0.m.pw1.c.weight": torch.ones(16, 8),
        "blocks1.0.mixer.m.attn.attention_bias_idxs": None,
    }
    taken = authors.table_of(type(model)).apply(theirs)  # type: ignore[arg-type]
    assert {n: t.shape for n, t in taken.items()} == {"stages.0.0.ffn0.module.pw1.conv.weight": (16, 8, 1, 1)}
    assert "stages.0.0.ffn0.module.pw1.conv.weight" in model.state_dict()


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is"):
        EfficientViT(heads=(1, 1))
    with pytest.raises(ValueError, match="must start with a multiple of 8"):
        EfficientViT(dims=(12, 16, 16))
