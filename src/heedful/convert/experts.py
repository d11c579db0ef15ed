"""Encoder layers made of heads that are experts, and of those heads the ones that are used."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.convert.model import KEY, note, parameters, put
from heedful.convert.report import Change, Cost, Report
from heedful.convert.shrp_prune import heads_to_keep
from heedful.convert.shrp_prune import prune_heads as prune_mixer
from heedful.convert.sites import ENCODERS, Site, choose_sites
from heedful.hf.attention import Visible
from heedful.mixers.heads.shrp import ROUTES, ExpertAttention
from heedful.registry import register


@register("to-shrp", kind="convert", paper="shrp", tags=("heads", "experts", "router", "surgery"))
def to_shrp(
    model: PreTrainedModel,
    *,
    hidden: int | None = None,
    route: str = "token",
    balance: float = 0.01,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """An encoder each of whose layers becomes x = LayerNorm(x + ExpertAttention(x)).

    Every token takes one head, and one expander for all heads stands in for the output projection and the
    feed-forward net. Heads keep their queries, keys and values, and the layer its last norm. The expander
    starts as W_2 gelu(W_1 o) = (sum over h of W_o,h) o, with W_1 = [I; -I; random], W_2 = [M, -M, 0], since
    gelu(z) - gelu(-z) = z; the router starts at random. All that is a start for `recover`; ours.

    model    of the BERT kind (bert, electra, roberta, xlm-roberta), no decoder
    hidden   channels inside the expander, at least two heads wide; None: 4 heads wide
    route    "token": each token has a head; "sequence": all tokens of a text have that of their mean
    balance  weight of the loss of uneven use; small, since heads are to become experts
    copy     False changes the model itself
    context  tokens that a token sees in the report's multiply-adds

    The rows of the report are whole layers. After recovery `prune_experts` leaves out heads by their use.
    Raises ValueError for another model and a hidden below two heads. Source: SHRP, arXiv 2512.20635.
    """
    check_choice("route", route, ROUTES)
    check_positive("context", context)
    sites = choose_sites(model, None, ENCODERS)
    if getattr(model.config, KEY, None) or model.config.is_decoder:
        raise ValueError("model has converted attention or is a decoder, must be an encoder as it was made")
    hidden = 4 * sites[0].head_dim if hidden is None else hidden
    check_positive("hidden", hidden)
    if hidden < 2 * sites[0].head_dim:
        raise ValueError(f"hidden is {hidden}, must be at least {2 * sites[0].head_dim}, two heads wide")
    changed = copying.deepcopy(model) if copy else model
    before = parameters(changed)
    numbers: dict[str, Any] = {"hidden": hidden, "route": route, "balance": balance}
    pairs, changes = [], []
    for site in choose_sites(changed, None, ENCODERS):
        name = site.name.removesuffix(ExpertLayer.inside)
        layer = changed.get_submodule(name)
        new = ExpertLayer(site, heads=site.heads, **numbers).start(site, layer)
        pairs.append((site, new))
        old = layer_cost(f"{site.heads} heads", site.cost(context).multiply_adds, layer)
        changes.append(Change(name, old, new.cost(context)))
    for site, new in pairs:
        put(changed, site, new)
    return changed, Report("one head a token", tuple(changes), (before, parameters(changed)), context)


@register("prune-experts", kind="convert", paper="shrp", tags=("heads", "experts", "pruning", "surgery"))
@torch.no_grad()
def prune_experts(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    *,
    share: float = 0.9,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model from `to_shrp` with, in each layer, the fewest heads that serve a share of the tokens.

    batches  what the model takes: which heads their real tokens choose is counted, layer by layer
    share    of the tokens; tokens whose head goes take the best of those left, and one head needs no router

    Raises ValueError without layers of experts or batches, and unless 0 < share <= 1.
    Source: SHRP, arXiv 2512.20635; the rule is ours.
    """
    check_positive("context", context)
    heads_to_keep(torch.ones(1), share)  # checks share
    if not any(isinstance(m, ExpertLayer) for m in model.modules()):
        raise ValueError("model has no layer of experts, must come from to_shrp")
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    changed = copying.deepcopy(model) if copy else model
    before = parameters(changed)
    layers = {name: m for name, m in changed.named_modules() if isinstance(m, ExpertLayer)}
    usage = {layer: torch.zeros(layer.experts.heads) for layer in layers.values()}

    def count(layer: ExpertLayer, x: Tensor, mask: Tensor | None) -> None:
        usage[layer] += layer.experts.usage(x, mask=mask).cpu()

    training = changed.training
    changed.eval()
    for layer in layers.values():
        layer.watch = count
    try:
        for batch in batches:
            changed(**batch)
    finally:
        for layer in layers.values():
            layer.watch = None
        changed.train(training)
    kept = {name: prune_mixer(m.experts, heads_to_keep(usage[m], share)) for name, m in layers.items()}
    costs = {name: layer.cost(context) for name, layer in layers.items()}
    for name, experts in kept.items():
        layers[name].experts = experts
        spec = layers[name].spec = {**layers[name].spec, "heads": experts.heads}
        note(changed, layers[name].layer, spec)
    changes = tuple(Change(name, costs[name], layer.cost(context)) for name, layer in layers.items())
    return changed, Report(f"heads that serve {share:.0%}", changes, (before, parameters(changed)), context)


class ExpertLayer(nn.Module):
    """A layer of an encoder, x = LayerNorm(x + ExpertAttention(x)), as transformers calls it.

    In training `experts.aux_losses["load_balance"]` tells how unevenly the heads are used.
    """

    kind: ClassVar[str] = "experts"
    inside: ClassVar[str] = ".attention.self"

    def __init__(self, site: Site, *, heads: int, hidden: int, route: str, balance: float) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "heads": heads,
            "hidden": hidden,
            "route": route,
            "balance": balance,
        }
        self.layer = site.layer
        like = site.query.weight
        self.experts = ExpertAttention(
            site.query.in_features,
            heads=heads,
            head_dim=site.head_dim,
            hidden=hidden,
            route=route,
            load_balance=balance,
            dropout=site.module.dropout.p,
            device=like.device,
            dtype=like.dtype,
        )
        dim, eps = site.query.in_features, site.module.config.layer_norm_eps
        self.norm = nn.LayerNorm(dim, eps=eps, device=like.device, dtype=like.dtype)
        self.watch: Any = None
        self.train(site.module.training)

    @torch.no_grad()
    def start(self, site: Site, layer: Any) -> ExpertLayer:
        """The heads of a site, its output projection in the expander, the last norm of its layer."""
        self.norm.load_state_dict(layer.output.LayerNorm.state_dict())
        e, d = self.experts, site.head_dim
        for new, old in ((e.query, site.query), (e.key, site.key), (e.value, site.value)):
            new.load_state_dict(old.state_dict())
        e.expand_in.weight[:d] = torch.eye(d)
        e.expand_in.weight[d : 2 * d] = -torch.eye(d)
        e.expand_in.bias[: 2 * d] = 0
        total = site.out.weight.unflatten(1, (-1, d)).sum(1)
        e.expand_out.weight.zero_()
        e.expand_out.weight[:, :d] = total
        e.expand_out.weight[:, d : 2 * d] = -total
        e.expand_out.bias.copy_(site.out.bias * e.heads)  # each is weighed with the gate, 1 / heads
        return self

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *_: Any, **__: Any) -> Tensor:
        mask = key_mask(attention_mask)
        if self.watch is not None:
            self.watch(self, hidden_states, mask)
        return self.norm(hidden_states + self.experts(hidden_states, mask=mask))

    def cost(self, context: int) -> Cost:
        """See `Cost`; a token attends with one head."""
        e = self.experts
        linears = [m for m in e.modules() if isinstance(m, nn.Linear)]
        return Cost(
            f"{e.heads} experts" if e.heads > 1 else "1 head",
            parameters(self),
            0,
            sum(m.weight.numel() for m in linears) + 2 * context * e.head_dim,
        )


def layer_cost(heads: str, attention: int, layer: Any) -> Cost:
    """Of a whole layer, from the words for its heads and the multiply-adds of its attention."""
    net = layer.intermediate.dense.weight.numel() + layer.output.dense.weight.numel()
    return Cost(f"{heads} and net", parameters(layer), 0, attention + net)


def key_mask(mask: Any) -> Bool[Tensor, "b n"] | None:
    """Which tokens may be seen, from the mask of any attention implementation; no query sees others."""
    if isinstance(mask, Visible):
        mask = mask.key_mask
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
    return mask if mask.dtype == torch.bool else mask > -1 if mask.is_floating_point() else mask.bool()
