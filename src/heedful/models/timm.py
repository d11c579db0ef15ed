"""heedful's backbones as timm models.

    import heedful.models.timm
    model = timm.create_model("heed_biformer_tiny", num_classes=10)

timm's names of arguments are understood: num_classes, in_chans, drop_path_rate, features_only; any other
goes to the model's constructor. `pretrained=True` is refused, since heedful ships no weights
(`heedful.authors.load` takes those of the authors).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from heedful.models import named
from heedful.models.backbone import Backbone
from heedful.torchvision_shim import mend_torchvision

mend_torchvision()
try:
    from timm.models import FeatureInfo, register_model
except ModuleNotFoundError as missing:
    raise ImportError("heedful.models.timm needs timm: pip install 'heedful[vision]'") from missing

PREFIX = "heed_"
_OURS = {"num_classes": "classes", "in_chans": "in_channels", "drop_path_rate": "drop_path"}


def _entrypoint(name: str) -> Callable[..., Backbone]:
    def create(pretrained: bool = False, **arguments: Any) -> Backbone:
        if pretrained:
            raise ValueError(
                f"pretrained is True, must be False: heedful ships no weights for {name!r}; "
                "heedful.authors.load takes those of the authors"
            )
        timm_only = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "out_indices")
        indices = arguments.get("out_indices")
        given = {_OURS.get(k, k): v for k, v in arguments.items() if k not in timm_only and v is not None}
        model = named.create(name, **given)
        assert isinstance(model, Backbone)
        stages = [
            {"num_chs": c, "reduction": r, "module": ""}
            for c, r in zip(model.channels, model.reductions, strict=True)
        ]
        if indices is not None and tuple(indices) != tuple(range(len(stages))):
            raise ValueError(f"out_indices is {indices!r}, must name all of the {len(stages)} maps in order")
        model.feature_info = FeatureInfo(stages, tuple(range(len(stages))))  # type: ignore[assignment]
        model.num_classes, model.num_features = model.classes, model.width  # type: ignore[assignment]
        return model

    create.__name__ = PREFIX + name
    create.__doc__ = f"heedful's {name}."
    return create


for _name, _family in ((n.name, n.entry.load()) for n in named.list()):
    if issubclass(_family, Backbone):
        register_model(_entrypoint(_name))
