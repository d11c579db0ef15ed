"""How much a model's output changes when one head falls silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from heedful.convert.sites import find_sites
from heedful.hf.tap import Handler, Site, tap


class _Silence(Handler):
    """One head of one layer puts out zeros."""

    def __init__(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head

    def wants(self, site: Site) -> bool:
        return site.layer == self.layer and not site.cross

    def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        return output.index_fill(1, torch.tensor([self.head], device=output.device), 0.0)


@torch.no_grad()
def head_importance(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, progress: bool = True
) -> Float[Tensor, "layers heads"]:
    """The change of the output when the output of one head is zero before the output projection.

        with logits:  Jensen-Shannon divergence of the probabilities with and without the head, in nats
        without:      1 - cos of the texts' embeddings, the means over their tokens, with and without it

    Both are means over the tokens, or texts, of all batches; padding (attention_mask 0) does not count. One
    pass over the batches for each head.

    model    of the Llama or BERT kind, as transformers made it
    batches  what the model takes, e.g. from a tokenizer

    A head whose slice of the output projection is zero has importance 0.
    Raises ValueError for another kind of model, or without batches. Source: arXiv 2303.13731; formulas ours.
    """
    sites = find_sites(model)
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    training = model.training
    model.eval()
    try:
        with tap(model, Handler()):  # the same kernels as below
            whole = [_outcome(model, batch) for batch in batches]
        importance = torch.zeros(max(s.layer for s in sites) + 1, max(s.heads for s in sites))
        each = [(site.layer, head) for site in sites for head in range(site.heads)]
        for layer, head in track(each, "heads", disable=not progress):
            total, count = 0.0, 0
            with tap(model, _Silence(layer, head)):
                for batch, before in zip(batches, whole, strict=True):
                    change = _change(before, _outcome(model, batch))
                    total, count = total + change.sum().item(), count + change.numel()
            importance[layer, head] = total / count
    finally:
        model.train(training)
    return importance


def _outcome(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[bool, Tensor]:
    """Log-probabilities of all real tokens, or embeddings of all texts."""
    output = model(**batch)
    mask = batch.get("attention_mask")
    if "logits" in output:
        logits = output["logits"].double().log_softmax(-1)
        real = mask.bool() if mask is not None and logits.ndim == 3 else ...
        return True, logits[real].flatten(0, -2)
    return False, mean_pooled(output["last_hidden_state"], mask)


def mean_pooled(hidden: Float[Tensor, "b n c"], mask: Any = None) -> Float[Tensor, "b c"]:
    """The mean over the tokens of each text, of length 1."""
    weight = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _change(before: tuple[bool, Tensor], after: tuple[bool, Tensor]) -> Tensor:
    (logarithmic, p), (_, q) = before, after
    if not logarithmic:
        return 1 - (p.double() * q.double()).sum(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
