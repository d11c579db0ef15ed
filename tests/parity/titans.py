"""Titans: the neural memory of the unofficial titans-pytorch, its outputs, last weights and momentum."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.linear.titans_pytorch import TitansPytorchMemory
from tests.parity.harness import Tensors, adapter


@adapter("titans-neural-memory-c1", "titans-neural-memory-h1", "titans-neural-memory-h2")
def memory(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    network = config["default_model_kwargs"]
    mixer = TitansPytorchMemory(
        config["dim"],
        heads=config.get("heads", 1),
        head_dim=config.get("dim_head"),
        chunk_size=config["chunk_size"],
        batch_size=config.get("batch_size"),
        depth=network["depth"],
        expansion=float(network["expansion_factor"]),
        max_lr=config.get("default_step_transform_max_lr", 1.0),
    )
    x = inputs["x"]
    y, state = load(mixer, params).eval()(x, state=mixer.init_state(len(x)))
    found = {"y": y}
    names = ["norm.gamma", *(f"model.weights.{layer}" for layer in range(network["depth"]))]
    sizes = [w.shape[1:] for w in (mixer.gamma, *mixer.memory)]
    for prefix, flat in (("state", state.weights), ("momentum", state.momentum)):
        parts = flat.flatten(0, 1).split([size.numel() for size in sizes], dim=-1)
        for name, part, size in zip(names, parts, sizes, strict=True):
            whole = part.reshape(-1, *size)
            found[f"{prefix}.{name}"] = whole[None] if prefix == "momentum" else whole
    return found
