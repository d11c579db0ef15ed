"""Attribution by leaving out one part at a time."""

from __future__ import annotations

import torch

from heedful.inspect.attribution import Attribution
from heedful.inspect.target import Target
from heedful.registry import register


@register(
    "occlusion",
    kind="inspect",
    paper="song-of-disagreement",
    tags=("attribution", "perturbation"),
    aliases=("leave-one-out",),
)
def occlusion(target: Target) -> Attribution:
    """f(x) - f(x without part j): what the number loses where the baseline stands in place of part j.

    target  the number f and the m parts of its input; m + 1 values are computed

    Parts that always stay get 0.
    """
    m = len(target.tokens)
    kept = torch.cat([torch.ones(1, m, dtype=torch.bool), ~torch.eye(m, dtype=torch.bool)])
    values = target.with_parts(kept)
    return Attribution("occlusion", target.tokens, (values[0] - values[1:]).cpu(), target.grid)
