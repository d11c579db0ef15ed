"""TransNeXt's frame around its attentions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import models
from heedful.mixers.grid.transnext import AggregatedAttention, GlobalCosineAttention
from heedful.models.transnext import TransNeXt
from heedful.testing.check_backbone import image, make


def norm(x, layer, eps):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def test_equals_transcription():
    model = make(TransNeXt)
    x = image(model)
    y, maps = x, []
    for stage in range(4):
        down, kernel, stride = model.downsample[stage], 3, 2
        if stage == 0:
            kernel, stride = 7, 4
        y = F.conv2d(y, down.proj.weight, down.proj.bias, stride=stride, padding=kernel // 2)
        y = norm(y, down.norm, 1e-5)
        for block in model.stages[stage]:
            y = y + block.mixer(norm(y, block.norm1, 1e-6))
            y = y + block.mlp(norm(y, block.norm2, 1e-6))
        y = norm(y, model.norms[stage], 1e-6)
        maps.append(y)
    torch.testing.assert_close(model.features(x), maps)
    torch.testing.assert_close(model(x), maps[-1].mean((2, 3)) @ model.head.weight.T + model.head.bias)


def test_where_the_map_is_not_pooled_attention_sees_all_of_it():
    model = TransNeXt(**TransNeXt.example)
    kinds = [[type(block.mixer) for block in stage] for stage in model.stages]
    assert kinds == [[AggregatedAttention]] * 3 + [[GlobalCosineAttention]]
    assert [stage[0].mixer.trained_size for stage in model.stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [stage[0].mixer.pool_ratio for stage in model.stages[:3]] == [8, 4, 2]
    pooled = TransNeXt(**{**TransNeXt.example, "pool_ratios": (16, 8, 4, 2)})
    assert all(isinstance(stage[0].mixer, AggregatedAttention) for stage in pooled.stages)


def test_rates_of_stochastic_depth_grow():
    model = TransNeXt(**TransNeXt.example, drop_path=0.3)
    rates = [stage[0].drop_path.rate for stage in model.stages]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_published_flops_of_micro_with_the_products_of_neighbours():
    with torch.device("meta"):
        model = models.create("transnext_micro")
        counted = models.multiply_adds(model, torch.zeros(1, 3, 224, 224))
    stages = zip((2, 2, 15), (48, 96, 192), (56, 28, 14), strict=True)
    near = sum(depth * 2 * 9 * dim * side**2 for depth, dim, side in stages)  # with keys and with values
    assert abs(counted + near - 2.7e9) <= 0.02 * 2.7e9


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"heads is \(1, 2\), must have 4 entries, one for each stage"):
        TransNeXt(heads=(1, 2))
