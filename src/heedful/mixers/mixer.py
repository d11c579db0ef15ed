"""The contract of a mixer: what every `nn.Module` in this room declares and accepts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.mixers.state import State
from heedful.registry import Entry


class Mixer(nn.Module):
    """A module that mixes tokens, positions or channels.

    `dim` is positional, all else keyword-only with the paper's defaults. Call signatures by kind:
      sequence: forward(x (b, n, c), *, context, mask, context_mask, positions, state) -> (b, n, c);
                with a state the result is (y, state) and x continues the sequence
      grid:     forward(x (b, c, *space)) -> (b, c, *space)
      channel:  forward(x (b, c, *space)) -> (b, c, *space)
      pool:     forward(x (b, n, c), *, mask) -> (b, c')
    Masks are boolean with True = may be seen.
    """

    entry: ClassVar[Entry]
    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}  # a small instance: cls(**example)

    def __init__(self, dim: int) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim is {dim!r}, must be a whole number of at least 1")
        self.dim = dim
        self.causal = self.entry.causal == "always"
        self.aux_losses: dict[str, Tensor] = {}  # filled by forward where the paper has them

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_losses": {}}  # losses hang on a graph, which cannot be copied

    def init_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        raise ValueError(f"{type(self).__name__} does not decode step by step")

    def example_inputs(
        self,
        *,
        batch: int = 2,
        length: int = 11,
        size: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call; `size` is the space of a grid or channel mixer."""
        generator = torch.Generator().manual_seed(seed)
        if self.entry.kind in ("grid", "channel"):
            if size is None:
                size = {1: (11,), 2: (9, 7), 3: (4, 5, 3)}[max(self.entry.spatial)]
            shape: tuple[int, ...] = (batch, self.dim, *size)
        else:
            shape = (batch, length, self.dim)
        return {"x": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}
