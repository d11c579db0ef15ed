"""What a loss would lose with each attention weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register

Batch = TypeVar("Batch")


def attention_influence(
    weights: Float[Tensor, "*b n n"], gradient: Float[Tensor, "*b n n"]
) -> Float[Tensor, "*b n n"]:
    """The change of the loss, to first order, if one weight became 0 and its row were normalised anew.

        E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 - A_ij + eps),   E_0j = -G_0j A_0j

    weights   A, rows that add up to 1; causal, so that the first row has one entry, which is 1
    gradient  G = d loss / d A

    Source: MoA, arXiv 2406.14909.
    """
    product = weights * gradient
    eps = torch.finfo(weights.dtype).eps
    influence = -weights * (gradient - product.sum(-1, keepdim=True)) / (1 - weights + eps)
    # Nothing would be left of the first row.
    return torch.cat([-product[..., :1, :], influence[..., 1:, :]], dim=-2)


def block_influence(influence: Float[Tensor, "*b n n"], block_size: int = 64) -> Float[Tensor, "*b i j"]:
    """The sums over blocks of block_size x block_size weights, of those at and below the diagonal."""
    check_positive("block_size", block_size)
    pad = -influence.shape[-1] % block_size
    padded = F.pad(influence.tril(), (0, pad, 0, pad))
    return padded.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).sum((-3, -1))


@register("attention-influence", kind="inspect", paper="moa", tags=("attribution", "profiling"))
def profile_influence(
    run: Callable[[Batch], tuple[Tensor, Sequence[Tensor]]],
    batches: Iterable[Batch],
    *,
    block_size: int = 64,
) -> Float[Tensor, "layers h i j"]:
    """The influence of every block of attention weights of a model on its loss, the mean over batches.

    run         batch -> (loss, weights): the loss, a mean over the batch, and of each layer the attention
                weights (b, h, n, n) that it was computed from. A causal model of transformers gives them with

                    model.set_attn_implementation("eager")
                    def run(ids):
                        out = model(ids, labels=ids, output_attentions=True)
                        return out.loss, out.attentions

    batches     calibration texts, all of one length; the authors let the dense model write the answers and
                take the loss on those alone
    block_size  tokens a block

    The weights of all layers are held at once. Signs are kept; `search_spans` takes absolute values.
    ValueError without a batch, or where weights do not enter the loss.
    Source: MoA, arXiv 2406.14909.
    """
    total, count = None, 0
    for batch in batches:
        with torch.enable_grad():
            loss, weights = run(batch)
        if not all(w.requires_grad for w in weights):
            raise ValueError("run gives weights that do not require gradients, must give those of the graph")
        gradients = torch.autograd.grad(loss, list(weights), allow_unused=True)
        layers = []
        for layer, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is None:
                raise ValueError(f"run gives weights of layer {layer} that the loss does not depend on")
            influence = attention_influence(weight.detach().float(), gradient.float())
            layers.append(block_influence(influence, block_size).sum(0))
        found = torch.stack(layers)
        total = found if total is None else total + found
        count += 1
    if total is None:
        raise ValueError("batches is empty, must hold at least one batch")
    return total / count
