"""FlashBias: attention with factored biases, and the exact factors of squared distances and ALiBi."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import heedful
from heedful import patterns as p
from heedful.ops.bias import FactoredBias, alibi_slopes, squared_distance_bias
from tests.parity.harness import adapter


@adapter("flashbias")
def flashbias(
    config: dict[str, Any], params: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    def attend(query: str, query_bias: str, key_bias: str, pattern: p.Pattern) -> Tensor:
        names = (query, "k", "v", query_bias, key_bias)
        q, k, v, qb, kb = (inputs[name].transpose(1, 2) for name in names)  # (b, n, h, d) to (b, h, n, d)
        scale = config["softmax_scale"]
        out = heedful.attention(q, k, v, bias=FactoredBias(qb, kb), scale=scale, pattern=pattern)
        return out.transpose(1, 2)

    outputs = {
        "y": attend("q", "q_bias", "k_bias", p.Full()),
        "y_causal": attend("q2", "q_bias2", "k_bias2", p.Causal()),
        "alibi_slopes_H8": alibi_slopes(8),
        "alibi_slopes_H12": alibi_slopes(12),
    }
    for space in (2, 3):
        factors = squared_distance_bias(inputs[f"pos{space}"])
        outputs[f"q_bias_{space}d"] = factors.query.transpose(1, 2)
        outputs[f"k_bias_{space}d"] = factors.key.transpose(1, 2)
    return outputs
