"""Paths of a pre-norm network cut off from its classifier, or weighed before it."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.convert.report import Change, Cost, Report
from heedful.inspect.path_ensemble import ResidualPaths, residual_paths, reweigh
from heedful.mixers.heads.ensemble_scale import EnsembleScale
from heedful.registry import register

KEY = "heedful_paths"  # in the model's configuration
NAME = "path_weights"  # of the module that the last norm gets, so that weights are saved with the model's own

M = TypeVar("M", bound=nn.Module)


@register("prune-paths", kind="convert", paper="path-ensemble", tags=("residual", "pruning", "surgery"))
def prune_paths(model: M, cut: Sequence[int], *, copy: bool = True) -> tuple[M, Report]:
    """A model whose last norm and classifier see its residual stream without some paths.

        x_L - sum of c_i over the paths i that are cut,   c = x_0, a_0, f_0, a_1, f_1, ...

    a_l and f_l are what the attention and the feed-forward net of layer l add. Inside the network all goes on
    as before, so that nothing gets smaller: the cut is a form for training on, in which short paths no longer
    speak for themselves.

    model  of transformers (llama, mistral, qwen2, qwen3, vit) or a VisionTransformer of timm
    cut    numbers of paths; `heedful.inspect.ablate_paths` tells what each is worth. The first ones are the
           short ones of the paper
    copy   False changes the model itself

    A model of transformers keeps the cut in its configuration, and `heedful.convert.load` brings it back.
    To cut nothing changes nothing. Raises ValueError for another model, for paths that are not there, for
    the last one, whose net would be left without any use, and for a model whose paths were cut before.
    Source: Path Ensemble, arXiv 2308.06548.
    """
    what = f"paths {', '.join(map(str, sorted(set(cut))))} cut" if cut else "no path cut"
    return _changed(model, cut, what, copy=copy)


@register("scale-paths", kind="convert", paper="path-ensemble", tags=("residual", "pruning", "surgery"))
def scale_paths(
    model: M, *, cut: Sequence[int] = (), init: float = 1.0, copy: bool = True
) -> tuple[M, Report]:
    """A model whose last norm and classifier see its paths with learned weights, one a channel.

        sum of w_i * c_i over the paths i that are not cut,   c = x_0, a_0, f_0, a_1, f_1, ...

    The weights are an `EnsembleScale`, a part of the model: they train, are saved and loaded with it
    (`heedful.convert.load`). Inside the network all goes on as before.

    model, cut, copy  as in `prune_paths`
    init              where the weights start; at 1 nothing changes

    Raises ValueError as `prune_paths` does. Source: Path Ensemble, arXiv 2308.06548.
    """
    what = "paths weighed" + (f", {', '.join(map(str, sorted(set(cut))))} cut" if cut else "")
    return _changed(model, cut, what, copy=copy, init=init)


class _Kept(nn.Module):
    """1 for each path that is seen, 0 for the others."""

    def __init__(self, components: int, cut: Sequence[int], like: Tensor) -> None:
        super().__init__()
        kept = like.new_ones(components)
        kept[list(cut)] = 0
        self.register_buffer("kept", kept)

    def table(self) -> Float[Tensor, " components"]:
        return self.kept  # type: ignore[return-value]


def weigh(model: nn.Module, spec: Mapping[str, Any]) -> ResidualPaths:
    """Cut and weigh paths in place as `spec` says, and note it."""
    paths = residual_paths(model)
    like: Tensor = paths.last.weight  # type: ignore[assignment]
    weights: EnsembleScale | _Kept
    if "init" in spec:
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        weights = EnsembleScale(len(like), components=paths.components, **spec, **made)
    else:
        weights = _Kept(paths.components, spec["cut"], like.detach())
    paths.last.add_module(NAME, weights)
    reweigh(paths, weights.table)
    if hasattr(model, "config"):
        setattr(model.config, KEY, dict(spec))
    return paths


def _changed(model: M, cut: Sequence[int], what: str, *, copy: bool, **scale: float) -> tuple[M, Report]:
    paths = residual_paths(model)
    last = paths.components - 1
    if not set(cut) <= set(range(last)):
        raise ValueError(
            f"cut is {tuple(cut)}, must name some of the paths 0 to {last - 1}; path {last} serves the "
            "classifier alone"
        )
    if hasattr(paths.last, NAME):
        raise ValueError("model has paths cut or weighed before, must be whole")
    changed = copying.deepcopy(model) if copy else model
    before = _count(changed), _count(paths.last)
    seen = weigh(changed, {"cut": sorted(set(cut)), **scale})
    name = next(name for name, module in changed.named_modules() if module is seen.last)
    change = Change(
        name,
        Cost(f"{last + 1} paths of {last + 1}", before[1], 0, 0),
        Cost(f"{last + 1 - len(set(cut))} paths of {last + 1}", _count(seen.last), 0, 0),
    )
    return changed, Report(what, (change,), (before[0], _count(changed)), 1)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
