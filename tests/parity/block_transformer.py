"""Block Transformer: its embedders and the expansion of context vectors."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.models.block_transformer import BlockEmbedder
from heedful.models.token_decoder import Expansion
from tests.parity.harness import Tensors, adapter

_PROJECTIONS = {"concat": "concat", "projection_layer": "conv"}


@adapter("block-transformer")
def block_transformer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    def of(case: str) -> Tensors:
        return {name[len(case) + 1 :]: v for name, v in params.items() if name.startswith(case + ".")}

    outputs: Tensors = {}
    for case, told in config.items():
        if "lc" in told:
            embedder = BlockEmbedder(
                told["lc"]["vocab_size"],
                told["kw"]["projection_hidden_size"],
                block_length=told["kw"]["block_length"],
                tokens=told["kw"]["n_embedding_tokens"],
                projection=_PROJECTIONS[told["kw"]["projection_method"]],
                hidden=told["lc"]["hidden_size"],
            )
            outputs[case] = authors.load(embedder, of(case))(inputs[f"{case}.input_ids"])
        else:
            expansion = Expansion(
                told["projection_hidden_size"], told["hidden_size"], ratio=told["expansion_ratio"]
            )
            renamed = {name.replace("expansion_layer", "conv"): v for name, v in of(case).items()}
            expansion.load_state_dict(renamed, strict=True)
            outputs[case] = expansion(inputs[f"{case}.block_embeddings"])
    return outputs
