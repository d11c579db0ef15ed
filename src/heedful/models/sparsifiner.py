"""Sparsifiner: DeiT whose patches attend to the keys that a small predictor estimates to matter."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from heedful.mixers.grid.sparsifiner import SparsifinerAttention
from heedful.models.deit import DeiT
from heedful.registry import register

# DeiT-S and its predictors: no counts were published, and of FLOPs only the share of attention that is saved.
CONFIGS = {
    "sparsifiner_small": {"parameters": 22_251_880, "arguments": {}},
}
_UNTAUGHT = "the choice passes no gradient, as published: the predictor learns from `dense` alone"


@register("sparsifiner-backbone", kind="model", paper="sparsifiner", tags=("image", "sparse", "predictor"))
class Sparsifiner(DeiT):
    """Vision transformer of patches, each of which attends to a predicted quarter of the others.

    It starts from a trained DeiT. In a first phase `dense` runs it with complete attention and the predictors
    learn to estimate that (`heedful.routing.connectivity.reconstruction_loss`, with the weights of a DeiT as
    teacher); in a second one it is trained as it is used, with the choice of the predictors, which rest.

    classes, in_channels, features_only  see `Backbone`
    dim, depth, image_size, patch, mlp_ratio, drop_path  see `DeiT`
    heads          of each block
    keep_rate      share of the keys that a patch keeps
    reduce_tokens, reduce_dim, coefficients, basis_threshold  see `ConnectivityPredictor`

    Source: Sparsifiner, arXiv 2303.13755.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 12,
        "depth": 2,
        "heads": 3,
        "reduce_tokens": 2,
        "coefficients": 3,
        "image_size": 64,
    }
    exempt: ClassVar[dict[str, str]] = {"gradients": _UNTAUGHT, "pyramid": _UNTAUGHT}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        keep_rate: float = 0.25,
        reduce_tokens: int = 6,
        reduce_dim: int = 2,
        coefficients: int = 8,
        basis_threshold: float = 0.02,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        side = image_size // patch
        super().__init__(
            lambda _: SparsifinerAttention(
                dim,
                heads=heads,
                size=(side, side),
                keep_rate=keep_rate,
                reduce_tokens=reduce_tokens,
                reduce_dim=reduce_dim,
                coefficients=coefficients,
                basis_threshold=basis_threshold,
            ),
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch=patch,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )

    def dense(
        self, x: Float[Tensor, "b c height width"]
    ) -> tuple[Float[Tensor, "b classes"], list[Tensor], list[Tensor]]:
        """The logits with complete attention, and for each layer the estimate and the weights themselves.

        Images of the size that the model is made for.
        """
        tokens, _ = self.embedded(x)
        estimates, weights = [], []
        blocks: Any = self.blocks
        for block in blocks:
            y, estimate, seen = block.mixer.dense(block.norm1(tokens))
            tokens = tokens + block.drop_path(y)
            tokens = tokens + block.drop_path(block.mlp(block.norm2(tokens)))
            estimates.append(estimate)
            weights.append(seen)
        return self.head(self.norm(tokens[:, 0])), estimates, weights
