"""How much each head of a trained model matters: what changes when it falls silent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.inspect.capture import capture
from heedful.inspect.site import Site
from heedful.ops.call import Call
from heedful.ops.observe import change
from heedful.registry import register


@contextmanager
def silenced(model: nn.Module, heads: Iterable[tuple[str, int]]) -> Iterator[None]:
    """Inside this context these heads of `model` put out zeros, before the output projection.

    heads: pairs (name of the attention module, head), as `Site.name` has them. Zeros are not uniform
    attention: the head adds nothing. Serves transformers models that heedful can tap and models of
    heedful.attention, scaled_dot_product_attention (timm) or torch.nn.MultiheadAttention. ValueError for
    names of no module, and at the end for modules that ran without a call of these.
    """
    chosen: dict[str, list[int]] = {}
    for name, head in heads:
        chosen.setdefault(name, []).append(head)
    with ExitStack() as stack:
        if _is_transformers(model):
            stack.enter_context(_tapped(model, chosen))
        else:
            stack.enter_context(_hooked(model, chosen))
        yield


def _is_transformers(model: nn.Module) -> bool:
    return "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel)


def _tapped(model: Any, chosen: dict[str, list[int]]) -> Any:
    from heedful.hf.tap import Handler, tap

    class Silence(Handler):
        def wants(self, site: Site) -> bool:
            return site.name in chosen

        def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
            return output.index_fill(1, torch.tensor(chosen[site.name], device=output.device), 0.0)

    return tap(model, Silence())


@contextmanager
def _hooked(model: nn.Module, chosen: dict[str, list[int]]) -> Iterator[None]:
    at_work: list[str] = []
    entered: set[str] = set()
    silent: set[str] = set()

    def quiet(out: Tensor, axis: int) -> Tensor:
        silent.add(at_work[-1])
        return out.index_fill(axis, torch.tensor(chosen[at_work[-1]], device=out.device), 0.0)

    def ends(call: Call, out: Tensor) -> Tensor:
        return quiet(out, 1) if at_work else out

    class Silence(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if at_work and func is F.multi_head_attention_forward:
                # (query, key, value, embed_dim, heads, ..., dropout, out_proj_weight, ...)
                args = list(args)
                width = args[3] // args[4]
                args[11] = args[11].clone()
                for head in chosen[at_work[-1]]:
                    args[11][:, head * width : (head + 1) * width] = 0
                silent.add(at_work[-1])
            out = func(*args, **kwargs)
            if at_work and func is F.scaled_dot_product_attention:
                out = quiet(out, -3)
            return out

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: Any) -> None:
            at_work.append(name)
            entered.add(name)

        return hook

    modules = dict(model.named_modules())
    unknown = sorted(set(chosen) - set(modules))
    if unknown:
        raise ValueError(f"heads are of {unknown[0]!r}, must be of modules of the model")
    handles = []
    by_hand = [modules[name] for name in chosen if getattr(modules[name], "fused_attn", None) is False]
    for name in chosen:
        handles.append(modules[name].register_forward_pre_hook(enter(name)))
        handles.append(modules[name].register_forward_hook(lambda m, a, o: at_work.pop() and None))
    try:
        for module in by_hand:
            module.fused_attn = True  # type: ignore[assignment]
        with Silence(), change(ends):
            yield
    finally:
        for module in by_hand:
            module.fused_attn = False  # type: ignore[assignment]
        for handle in handles:
            handle.remove()
    if loud := sorted(entered - silent):
        raise ValueError(f"heads are of {loud[0]!r}, which made no attention call that can be silenced")


def jensen_shannon(before: Float[Tensor, "*b c"], after: Float[Tensor, "*b c"]) -> Float[Tensor, "*b"]:
    """The Jensen-Shannon divergence in nats of the probabilities of logits, row by row."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2


def cosine_distance(before: Float[Tensor, "*b c"], after: Float[Tensor, "*b c"]) -> Float[Tensor, "*b"]:
    """1 - cos of embeddings, row by row."""
    return 1 - F.cosine_similarity(before.double(), after.double(), dim=-1)


def probability_drop(
    before: Float[Tensor, "b c"], after: Float[Tensor, "b c"], labels: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """p_y - p'_y, from logits."""
    p, q = (x.double().softmax(-1).gather(-1, labels[:, None])[:, 0] for x in (before, after))
    return p - q


def accuracy_drop(
    before: Float[Tensor, "b c"], after: Float[Tensor, "b c"], labels: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """1 where the label was found before and is not now, -1 where the other way round, else 0."""
    found, still = ((x.argmax(-1) == labels).double() for x in (before, after))
    return found - still


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """importance of each head, (heads, samples), and which heads: (module, layer, head)."""

    heads: list[tuple[str, int, int]]
    samples: Float[Tensor, "heads samples"]

    @property
    def mean(self) -> Float[Tensor, " heads"]:
        return self.samples.mean(1)


@register(
    "head-importance-by-pruning",
    kind="inspect",
    paper="vit-visual-analytics",
    tags=("pruning",),
)
@torch.no_grad()
def head_importance_by_pruning(
    model: nn.Module,
    run: Callable[[], Tensor],
    *,
    measure: Callable[[Tensor, Tensor], Tensor] = cosine_distance,
    keep_only: bool = False,
    modules: Container[str] | None = None,
    on_head: Callable[[int, int], None] | None = None,
) -> HeadImportance:
    """What the output of `run` loses with each head of self-attention, one pass for each head.

    run        computes logits or embeddings of a set of samples, (samples, c), with `model`
    measure    (before, after) -> one number a sample: `cosine_distance`, `jensen_shannon`, or
               `probability_drop` and `accuracy_drop` with labels
    keep_only  silence all other heads of the layer instead, so that the number tells how much is lost where
               this head alone is left
    modules    the names of those whose heads are asked for; None: all
    on_head    told the number of heads done and of all

    A head whose slice of the output projection is zero has importance 0.
    Source: arXiv 2303.13731; formulas ours.
    """
    found: dict[tuple[str, int], int] = {}

    def see(site: Site) -> None:
        if not site.cross and (modules is None or site.name in modules):
            found[site.name, site.layer] = site.shape[1]

    with capture(model, see):
        before = run()
    heads = [(name, layer, head) for (name, layer), count in found.items() for head in range(count)]
    rows = []
    for done, (name, layer, head) in enumerate(heads):
        others = [(name, other) for other in range(found[name, layer]) if other != head]
        with silenced(model, others if keep_only else [(name, head)]):
            rows.append(measure(before, run()))
        if on_head is not None:
            on_head(done + 1, len(heads))
    return HeadImportance(heads, torch.stack(rows) if rows else before.new_zeros(0, len(before)))
