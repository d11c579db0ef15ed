"""p-adapter: what follows the heads, with the graph that the authors' attention hands over."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.heads.p_adapter import AdaptedOutput
from tests.parity.harness import Tensors, adapter


def run(config: Any, params: Tensors, inputs: Tensors, *, cross: bool) -> Tensors:
    output = AdaptedOutput(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        reduction=config["text_laplacian_adapter_reduction_factor"],
        p=config[f"laplacian_adapter_p_{'cross' if cross else 'self'}"],
        learnable_p=config["learnable_p"],
        mu=config["laplacian_adapter_mu"],
        norm_eps=config["layer_norm_eps"],
        dropout=config["hidden_dropout_prob"],
    ).eval()
    authors.load(output, params)
    hidden, residual, graph = inputs["hidden"], inputs["input"], inputs["attention_map"]
    nodes = output.nodes(inputs["value_hidden"])
    # Across, the authors hand over the table of the whole graph, queries first; its other corners are
    # zeros, or the transpose.
    n = hidden.shape[1] if cross else 0
    queries = nodes[:, :, :n] if cross else nodes
    edges = graph[:, :, : hidden.shape[1], n:]
    return {
        "y": output(hidden, residual, edges, queries, nodes[:, :, n:], own=not cross),
        "y_without_adapter": output(hidden, residual),
    }


@adapter("p-adapter-self")
def p_adapter_self(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return run(config, params, inputs, cross=False)


@adapter("p-adapter-cross")
def p_adapter_cross(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return run(config, params, inputs, cross=True)
