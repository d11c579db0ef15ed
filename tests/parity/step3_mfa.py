"""Multi-matrix factorization attention: the module contributed to vLLM for Step-3."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.heads.step3_mfa import MultiMatrixFactorizationAttention
from tests.parity.harness import Tensors, adapter


@adapter("step3-mfa")
def step3_mfa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MultiMatrixFactorizationAttention(
        config["hidden_size"],
        heads=config["num_heads"],
        head_dim=config["head_dim"],
        query_rank=config["share_q_dim"],
        rotary_base=config["rope_parameters"]["rope_theta"],
        norm_eps=config["norm_eps"],
    ).eval()
    authors.load(mixer, params)
    return {"y": mixer(inputs["hidden_states"][None], positions=inputs["positions"])[0]}
