"""Similarity of the segmentation token, and points from it."""

from __future__ import annotations

from typing import Any

from heedful.inspect.similarity_points import (
    discrete_to_continuous,
    seg_token_similarity_map,
    similarity_to_points,
)
from tests.parity.harness import Tensors, adapter


@adapter("read-sasp")
def read_sasp(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    outputs = {"similarity": seg_token_similarity_map(inputs["image_features"], inputs["text_features"])}
    for i, case in enumerate(config["cases"]):
        similarity, size = inputs[case["sim"]], tuple(case["shape"])
        options = {name: case[name] for name in ("down_sample", "num_points", "t_pos", "t_neg")}
        points, outputs[f"labels{i}"] = similarity_to_points(similarity, size, **options)
        outputs[f"points{i}"] = discrete_to_continuous(similarity, points, size)
    return outputs
