"""Attention modules put into models, and converted models loaded again."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from heedful.checks import check_positive
from heedful.convert.adapters import KEY as ADAPTERS
from heedful.convert.adapters import freeze_others, insert
from heedful.convert.attention import ConvertedAttention
from heedful.convert.paths import KEY as PATHS
from heedful.convert.paths import weigh
from heedful.convert.report import Change, Report
from heedful.convert.sites import DIFFERENTIAL, ENCODERS, ROTARY, Site, choose_sites, find_sites

KEY = "heedful_converted"  # in the model's configuration: of each converted layer what it became


def parameters(model: nn.Module) -> int:
    """Numbers that a model learns."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    what: str,
    make: Callable[[Site], ConvertedAttention],
    *,
    layers: Sequence[int] | None,
    copy: bool,
    context: int,
    families: Sequence[str] = ROTARY + ENCODERS,
) -> tuple[PreTrainedModel, Report]:
    """A model with other attention in some layers (None: all that are not converted yet), and the report.

    make   gives the new module of a site and leaves the site alone; all are made before any is put in, so
           that an error leaves the model as it was
    """
    check_positive("context", context)
    choose_sites(model, layers, families)
    changed = copying.deepcopy(model) if copy else model
    before = parameters(changed)
    pairs = [(site, make(site)) for site in choose_sites(changed, layers, families)]
    changes = tuple(Change(site.name, site.cost(context), new.cost(context)) for site, new in pairs)
    for site, new in pairs:
        put(changed, site, new)
    return changed, Report(what, changes, (before, parameters(changed)), context)


def put(model: PreTrainedModel, site: Site, new: Any) -> None:
    """Let `new` stand in the place of a site, or of its layer, and note in the configuration what it is."""
    model.set_submodule(site.name.removesuffix(new.inside), new)
    if isinstance(new, ConvertedAttention) and not site.rotary:
        site.parent.output.dense = nn.Identity()  # type: ignore[union-attr]  # it is `new.o_proj`
    note(model, site.layer, new.spec)


def note(model: PreTrainedModel, layer: int, spec: dict[str, Any]) -> None:
    """What a layer has become, in the configuration."""
    setattr(model.config, KEY, {**(getattr(model.config, KEY, None) or {}), str(layer): spec})


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model that `save_pretrained` wrote to a folder, with its converted attention.

    A plain `from_pretrained` does not know converted attention, and would start it at random. Keyword
    arguments are those of `from_pretrained`. Raises ValueError if there is no model in `path`, or one whose
    conversion this version does not know.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"path is {str(path)!r}, must be a folder with a config.json")
    config = AutoConfig.from_pretrained(path)
    name = (config.architectures or [""])[0]
    plain = getattr(transformers, name, None)
    if plain is None:
        raise ValueError(
            f"the model in {str(path)!r} is a {name or 'thing without name'}, no transformers class"
        )
    specs = getattr(config, KEY, None) or {}
    kinds = _kinds()
    for spec in specs.values():
        if spec["kind"] not in kinds:
            raise ValueError(f"the model in {str(path)!r} has attention of an unknown kind, {spec['kind']!r}")

    class Converted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for site in find_sites(self, ROTARY + ENCODERS + DIFFERENTIAL) if specs else ():
                if str(site.layer) in specs:
                    spec = dict(specs[str(site.layer)])
                    put(self, site, kinds[spec.pop("kind")](site, **spec))
            if numbers := getattr(config, ADAPTERS, None):
                insert(self, numbers)
            if paths := getattr(config, PATHS, None):
                weigh(self, paths)

    for name in ("__name__", "__qualname__", "__module__"):  # by which transformers finds what a class has
        setattr(Converted, name, getattr(plain, name))
    model = Converted.from_pretrained(path, **kwargs)
    model.__class__ = plain
    if getattr(config, ADAPTERS, None):
        freeze_others(model)
    return model


def _kinds() -> dict[str, Any]:
    from heedful.convert.attention import HeadsAttention
    from heedful.convert.experts import ExpertLayer
    from heedful.convert.gda import GrownAttention
    from heedful.convert.mla import LatentAttention
    from heedful.convert.moh import MixtureOfHeadsAttention

    made = (ExpertLayer, GrownAttention, HeadsAttention, LatentAttention, MixtureOfHeadsAttention)
    return {kind.kind: kind for kind in made}
