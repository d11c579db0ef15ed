"""heedful inside pretrained Hugging Face models (transformers 5).

    import heedful.hf
    model.set_attn_implementation("heedful")
    with heedful.hf.use_pattern(patterns.Window(256) | patterns.Sink(4)):
        model.generate(ids)

`tap` lets a handler see or change every attention call of a model for a while: steering and inspection are
made of it.
"""

from heedful.torchvision_shim import mend_torchvision

mend_torchvision()

from heedful.hf.attention import (  # noqa: E402
    NAME,
    Visibility,
    Visible,
    attention_forward,
    keepers,
    use_pattern,
    visibility,
    visible_mask,
)
from heedful.hf.tap import Handler, Site, tap  # noqa: E402

__all__ = [
    "NAME",
    "Handler",
    "Site",
    "Visibility",
    "Visible",
    "attention_forward",
    "keepers",
    "tap",
    "use_pattern",
    "visibility",
    "visible_mask",
]
