"""A learned weight for every path of a residual network to its classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.registry import register


@register("ensemble-scale", kind="op", paper="path-ensemble", tags=("residual", "pruning"))
class EnsembleScale(nn.Module):
    """A sum of paths with learned weights, one a channel: y = sum over kept paths i of w_i * c_i.

    dim         channels
    components  paths: x_0 and the output of each attention and feed-forward part, 2 L + 1 for L layers
    cut         paths left out, which have no weights; short ones, in the paper
    init        where the weights start; at 1 the network is what it was

    forward takes the paths in order, one at a time, and keeps nothing but their sum. In a model,
    `heedful.inspect.reweighted(paths, scale.table)` puts the sum before the classifier.
    Raises ValueError on sizes below 1, for a cut that names no path or leaves none, and in forward for
    another number of paths. Source: Path Ensemble, arXiv 2308.06548.
    """

    def __init__(
        self,
        dim: int,
        *,
        components: int,
        cut: Sequence[int] = (),
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("components", components)
        if not set(cut) < set(range(components)):
            raise ValueError(f"cut is {tuple(cut)}, must be some of 0 to {components - 1} but not all")
        self.components = components
        self.kept = [i for i in range(components) if i not in set(cut)]
        self.weight = nn.Parameter(torch.full((len(self.kept), dim), init, device=device, dtype=dtype))

    def table(self) -> Float[Tensor, "components c"]:
        """The weights of all paths; zeros where they are cut."""
        index = torch.tensor(self.kept, device=self.weight.device)
        table = self.weight.new_zeros(self.components, self.weight.shape[1])
        return table.index_copy(0, index, self.weight)

    def forward(self, components: Iterable[Float[Tensor, "b n c"]]) -> Float[Tensor, "b n c"]:
        rows = dict(zip(self.kept, self.weight, strict=True))
        total: Tensor | None = None
        count = 0
        for count, component in enumerate(components, start=1):
            if count - 1 in rows:
                part = rows[count - 1] * component
                total = part if total is None else total + part
        if count != self.components or total is None:
            raise ValueError(f"components are {count}, must be {self.components}")
        return total
