"""What an attribution explains: a number that a model gives, as a function of the parts of one input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

_ROWS = 32  # inputs that are computed at once


@dataclass(frozen=True, eq=False)
class Target:
    """A number as a function of m parts of an input, each a vector; what all attributions are taken of.

    value     (b, m, c) -> (b): the number for each of b inputs, differentiable, row by row
    x         (m, c) the input: embeddings of tokens, or the pixels of patches
    baseline  (m, c) what stands in place of a part that is not there
    tokens    what the parts are called
    fixed     (m) True at parts that always stay, such as [CLS]; None: none does
    grid      (height, width) in patches of an image
    name      what the number is, in words

    It may be of any model: `text_target` and `image_target` make it for transformers, timm and plain modules.
    """

    value: Callable[[Tensor], Tensor]
    x: Float[Tensor, "m c"]
    baseline: Float[Tensor, "m c"]
    tokens: list[str]
    fixed: Bool[Tensor, " m"] | None = None
    grid: tuple[int, int] | None = None
    name: str = "the output"

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.x.shape != self.baseline.shape or len(self.x) != len(self.tokens):
            raise ValueError(
                f"x has shape {tuple(self.x.shape)} and baseline {tuple(self.baseline.shape)}, both must be "
                f"({len(self.tokens)}, c), one row a token"
            )

    @property
    def free(self) -> Bool[Tensor, " m"]:
        """The parts that can be taken away."""
        fixed = torch.zeros(len(self.tokens), dtype=torch.bool) if self.fixed is None else self.fixed
        return ~fixed.to(self.x.device)

    @property
    def change(self) -> Float[Tensor, "m c"]:
        """x - baseline, and 0 for parts that stay."""
        return (self.x - self.baseline) * self.free[:, None].to(self.x.dtype)

    @torch.no_grad()
    def with_parts(self, kept: Bool[Tensor, "b m"]) -> Float[Tensor, " b"]:
        """The number where only the kept parts are there, and those that always stay."""
        kept = kept.to(self.x.device) | ~self.free
        found = [
            self.value(torch.where(rows[..., None], self.x, self.baseline)) for rows in kept.split(_ROWS)
        ]
        return torch.cat(found) if found else self.x.new_zeros(0)

    def with_all(self) -> float:
        """The number for the input."""
        return float(self.with_parts(torch.ones(1, len(self.tokens), dtype=torch.bool)))

    def with_none(self) -> float:
        """The number for the baseline."""
        return float(self.with_parts(torch.zeros(1, len(self.tokens), dtype=torch.bool)))

    def gradient(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """The gradient of the number at each of b inputs."""
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.value(x).sum(), x)
        return found.detach()


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one input, and the model's output for b inputs (b, m, c) made of such parts."""

    run: Callable[[Tensor], Any]
    x: Float[Tensor, "m c"]
    baseline: Float[Tensor, "m c"]
    tokens: list[str]
    grid: tuple[int, int] | None = None

    def target(
        self,
        score: Callable[[Any], Tensor],
        *,
        fixed: Bool[Tensor, " m"] | None = None,
        name: str = "the output",
    ) -> Target:
        """With a score of the model's output for b inputs, (b)."""
        run = self.run
        return Target(lambda x: score(run(x)), self.x, self.baseline, self.tokens, fixed, self.grid, name)


def text_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    tokens: Sequence[str] | None = None,
    baseline: Float[Tensor, " c"] | None = None,
) -> Parts:
    """The embeddings of one text's tokens as parts; arguments and errors as those of `text_target`."""
    rest = dict(inputs)
    ids = rest.pop("input_ids", None)
    if ids is None or ids.shape[0] != 1:
        raise ValueError("inputs must have input_ids of one text, (1, m)")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"model is a {type(model).__name__}, must take inputs_embeds")
    table = model.get_input_embeddings()  # type: ignore[operator]

    def run(embeddings: Tensor) -> Any:
        rows = len(embeddings)
        more = {k: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in rest.items()}
        return model(inputs_embeds=embeddings, **more)

    with torch.no_grad():
        x = table(ids)[0]
        if baseline is None:
            pad = getattr(model.config, "pad_token_id", None)
            baseline = torch.zeros_like(x[0]) if pad is None else table(torch.tensor([pad]).to(ids))[0]
        own, ours = model(**inputs)[0], run(x[None])[0]
    if (own - ours).abs().max() > 1e-3 * own.abs().max():
        raise ValueError(
            f"{type(model).__name__} gives another output from embeddings than from ids, must give the same: "
            "it uses the ids elsewhere too"
        )
    named = list(tokens) if tokens is not None else [str(int(i)) for i in ids[0]]
    return Parts(run, x, baseline.to(x).expand_as(x), named)


def image_parts(
    model: Callable[..., Any],
    pixels: Float[Tensor, "1 c height width"],
    grid: tuple[int, int],
    *,
    baseline: float = 0.0,
) -> Parts:
    """The patches of one image as parts; arguments and errors as those of `image_target`."""
    rows, columns = grid
    if len(pixels) != 1 or min(grid) < 1 or pixels.shape[-2] % rows or pixels.shape[-1] % columns:
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}, must be (1, c, height, width), a height "
            f"divided by {rows} and a width by {columns}"
        )
    sizes = {"h": rows, "w": columns, "p": pixels.shape[-2] // rows, "q": pixels.shape[-1] // columns}

    def run(parts: Tensor) -> Any:
        images = rearrange(parts, "b (h w) (c p q) -> b c (h p) (w q)", **sizes)
        return model(pixel_values=images) if hasattr(model, "config") else model(images)

    x = rearrange(pixels, "1 c (h p) (w q) -> (h w) (c p q)", **sizes)
    tokens = [f"{row + 1},{column + 1}" for row in range(rows) for column in range(columns)]
    return Parts(run, x, torch.full_like(x, baseline), tokens, grid)


def text_target(
    model: nn.Module,
    inputs: Mapping[str, Any],
    score: Callable[[Any], Tensor],
    *,
    tokens: Sequence[str] | None = None,
    fixed: Bool[Tensor, " m"] | None = None,
    baseline: Float[Tensor, " c"] | None = None,
    name: str = "the output",
) -> Target:
    """A number of a transformers text model as a function of the embeddings of one text's tokens.

    model     takes `inputs_embeds`; in eval mode
    inputs    what a tokenizer gives for one text: input_ids (1, m), attention_mask ...
    score     the model's output for b texts -> (b)
    tokens    what they are called; by default their ids
    fixed     True at tokens that always stay
    baseline  the embedding of a token that is not there; by default that of the padding token, or zeros
              where the model has none

    Raises ValueError for more than one text, and for a model that does not give the same from embeddings as
    from ids.
    """
    return text_parts(model, inputs, tokens=tokens, baseline=baseline).target(score, fixed=fixed, name=name)


def image_target(
    model: Callable[..., Any],
    pixels: Float[Tensor, "1 c height width"],
    score: Callable[[Any], Tensor],
    *,
    grid: tuple[int, int],
    baseline: float = 0.0,
    name: str = "the output",
) -> Target:
    """A number of an image model as a function of the patches of one image.

    model     of transformers (called with pixel_values), or any module that takes the pixels; in eval mode
    score     the model's output for b images -> (b)
    grid      (rows, columns) of patches that the image is cut into; its height and width take pixel by pixel
    baseline  the pixel that stands for nothing; 0 is the mean colour of images that were normalised

    Raises ValueError if the patches do not divide the image.
    """
    return image_parts(model, pixels, grid, baseline=baseline).target(score, name=name)
