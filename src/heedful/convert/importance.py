"""How much a model's output changes when one head falls silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.convert.model import KEY
from heedful.convert.sites import find_sites
from heedful.inspect.head_importance import cosine_distance, head_importance_by_pruning, jensen_shannon


@torch.no_grad()
def head_importance(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, progress: bool = True
) -> Float[Tensor, "layers heads"]:
    """What a model loses with each head, by `head_importance_by_pruning`, as `heads_by_importance` takes it.

        with logits:  Jensen-Shannon divergence of the probabilities with and without the head, in nats
        without:      1 - cos of the texts' embeddings, the means over their tokens, with and without it

    Both are means over the tokens, or texts, of all batches; padding (attention_mask 0) does not count. One
    pass over the batches for each head.

    model     of the Llama or BERT kind, as transformers made it
    batches   what the model takes, e.g. from a tokenizer
    progress  show it

    Raises ValueError for another kind of model, or without batches. Source: arXiv 2303.13731; formulas ours.
    """
    sites = find_sites(model)
    if getattr(model.config, KEY, None):
        raise ValueError("model has converted attention, must have its own in every layer")
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    total = torch.zeros(max(s.layer for s in sites) + 1, max(s.heads for s in sites), dtype=torch.float64)
    count, training = 0, model.training
    model.eval()
    try:
        measure = jensen_shannon if "logits" in model(**batches[0]) else cosine_distance
        with Progress(disable=not progress) as bar:
            task = bar.add_task("heads", total=len(batches) * sum(site.heads for site in sites))
            for batch in batches:
                found = head_importance_by_pruning(
                    model,
                    lambda batch=batch: _outcome(model, batch),  # type: ignore[misc]
                    measure=measure,
                    on_head=lambda done, of: bar.advance(task),
                )
                for (_, layer, head), samples in zip(found.heads, found.samples, strict=True):
                    total[layer, head] += samples.sum().item()
                count += found.samples.shape[1]
    finally:
        model.train(training)
    return (total / count).float()


@torch.no_grad()
def changed_outcome(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], module: nn.Module, hook: Any
) -> float:
    """What a model loses when a forward hook changes one of its modules, in the same measures."""
    total, count, training = 0.0, 0, model.training
    model.eval()
    try:
        for batch in batches:
            measure = jensen_shannon if "logits" in model(**batch) else cosine_distance
            whole = _outcome(model, batch)
            handle = module.register_forward_hook(hook)
            try:
                lost = measure(whole, _outcome(model, batch))
            finally:
                handle.remove()
            total, count = total + lost.double().sum().item(), count + len(lost)
    finally:
        model.train(training)
    return total / count


def _outcome(model: PreTrainedModel, batch: Mapping[str, Any]) -> Float[Tensor, "samples c"]:
    """Logits of all real tokens, or embeddings of all texts."""
    output, mask = model(**batch), batch.get("attention_mask")
    if "logits" not in output:
        return mean_pooled(output["last_hidden_state"], mask)
    logits = output["logits"]
    return logits.flatten(0, -2) if mask is None or logits.ndim == 2 else logits[mask.bool()]


def mean_pooled(hidden: Float[Tensor, "b n c"], mask: Any = None) -> Float[Tensor, "b c"]:
    """The mean over the tokens of each text, of length 1."""
    weight = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)
