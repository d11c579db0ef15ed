"""Union of Experts: the authors' selective attention, with and without memory, and their MLP of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful import authors
from heedful.mixers.heads.selective_multi_head_attention import SelectiveMultiHeadAttention
from heedful.mixers.heads.union_mlp import UnionMLP
from tests.parity.harness import Tensors, adapter


def residual(config: Any, params: Tensors, x: Tensor, y: Tensor) -> Tensor:
    """What the authors' class does after the mechanism; the norm comes before it, outside, with pre_lnorm."""
    if config["pre_lnorm"]:
        return x + y
    return F.layer_norm(x + y, x.shape[-1:], params["layer_norm.weight"], params["layer_norm.bias"])


@adapter("uoe-smha", "uoe-smha-prenorm")
def smha(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = SelectiveMultiHeadAttention(config["d_model"], heads=config["n_head"], selection="paper").eval()
    authors.load(mixer, params)
    x = inputs["x"]
    route, selected = mixer.gate.published(x)
    # Every list has the same length, so the chosen tokens of each (expert, row) can be stacked.
    ids = [[selected[b, :, e].nonzero()[:, 0] for b in range(len(x))] for e in range(selected.shape[2])]
    outputs = {
        "y": residual(config, params, x, mixer(x)),
        "route": route,
        "seq_ids": torch.stack([torch.stack(rows) for rows in ids]),
    }
    if "mems" in inputs:
        # The mask shows the whole memory and hides the future of x, which is what the mixer does.
        y = mixer.published(x, memory=inputs["mems"].transpose(0, 1))
        outputs["y_mem"] = residual(config, params, x, y)
    return outputs


@adapter("uoe-mlp")
def uome(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = UnionMLP(
        config["d_model"],
        hidden=config["d_inner"],
        experts=config["n_experts"],
        topk=config["topk"],
        selection="paper",
    ).eval()
    authors.load(mixer, params)
    x = inputs["x"]
    return {"y": residual(config, params, x, mixer(x))}
