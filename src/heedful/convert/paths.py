"""Paths of a pre-norm network cut off from its classifier."""

from __future__ import annotations

import copy as copying
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from heedful.convert.report import Change, Cost, Report
from heedful.inspect.path_ensemble import ResidualPaths, residual_paths, reweigh
from heedful.registry import register

KEY = "heedful_cut_paths"  # in the model's configuration

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
    paths = residual_paths(model)
    last = paths.components - 1
    if not set(cut) <= set(range(last)):
        raise ValueError(
            f"cut is {tuple(cut)}, must name some of the paths 0 to {last - 1}; path {last} serves the "
            "classifier alone"
        )
    if hasattr(paths.last, KEY):
        raise ValueError(f"model has paths cut before, {getattr(paths.last, KEY)}, must be whole")
    changed = copying.deepcopy(model) if copy else model
    cut = sorted(set(cut))
    seen = cut_off(changed, cut)
    name = next(name for name, module in changed.named_modules() if module is seen.last)
    count = sum(p.numel() for p in seen.last.parameters())
    before, after = (
        Cost(f"{k} paths of {paths.components}", count, 0, 0)
        for k in (paths.components, paths.components - len(cut))
    )
    whole = sum(p.numel() for p in changed.parameters())
    what = f"paths {', '.join(map(str, cut))} cut" if cut else "no path cut"
    return changed, Report(what, (Change(name, before, after),), (whole, whole), 1)


def cut_off(model: nn.Module, cut: Sequence[int]) -> ResidualPaths:
    """Cut paths in place, and note it."""
    paths = residual_paths(model)
    kept = torch.ones(paths.components)
    kept[list(cut)] = 0
    reweigh(paths, kept)
    setattr(paths.last, KEY, list(cut))
    if hasattr(model, "config"):
        setattr(model.config, KEY, list(cut))
    return paths
