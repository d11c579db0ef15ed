"""How much each part of an input has to do with a number that a model gives."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """One score for each token of a text, or each patch of an image.

    method  how it was found, e.g. "integrated gradients"
    tokens  what the parts are called, in order
    scores  (m), in the unit of the number that is explained; more than 0 where the part raises it.
            Detached, on the CPU. Methods that know no sign give scores of at least 0
    grid    (height, width) in patches of an image, whose parts go row by row; None for texts
    """

    method: str
    tokens: list[str]
    scores: Float[Tensor, " m"]
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.scores.shape != (len(self.tokens),):
            raise ValueError(
                f"scores have shape {tuple(self.scores.shape)}, must be ({len(self.tokens)},), one a token"
            )
        if self.grid is not None and self.grid[0] * self.grid[1] != len(self.tokens):
            raise ValueError(f"grid is {self.grid}, must have {len(self.tokens)} places, one a token")

    @property
    def magnitude(self) -> Float[Tensor, " m"]:
        """|scores|: how much a part matters, whichever way."""
        return self.scores.abs()

    @property
    def order(self) -> Int[Tensor, " m"]:
        """The parts from the highest score to the lowest; equal ones in the order of the input."""
        return self.scores.argsort(descending=True, stable=True)

    def map(self) -> Float[Tensor, "height width"]:
        """The scores of an image as a map."""
        if self.grid is None:
            raise ValueError("grid is None, must be (height, width): this is the attribution of a text")
        return self.scores.unflatten(0, self.grid)
