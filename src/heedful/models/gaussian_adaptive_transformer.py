"""A classifier on a frozen pretrained encoder, whose layers Gaussian adaptive attention weighs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_choice, check_mask, check_positive
from heedful.mixers.heads.gaam import GaussianAdaptiveAttention, GaussianBlock


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class GaussianAdaptiveTransformer(nn.Module):
    """Classes from the outputs of all layers of a frozen encoder, weighed by a `GaussianBlock`.

        s = (embeddings, layer 1, ..., layer L) of the encoder, (b, L + 1, n, c)
        s <- GaussianBlock(s);  h = mean of s over layers
        logits = classifier(mean over unmasked tokens of gelu(W h + b))

    encoder    a transformers model whose config has hidden_size and num_hidden_layers, and whose
               hidden_states all have the shape (b, n, hidden_size)
    classes    numbers a sample that come out
    blocks, heads, gaussians  layers of the block, slices of the axis (each of two numbers or more), Gaussians
    norm_axis  axis of s that the weights run along. 1: layers, for each token and channel; 3: channels.
               Not 2: along tokens, padding would count as zeros
    hidden     width of W

    The encoder is no submodule: parameters(), state_dict(), to() and train() pass it by, and it runs without
    gradients and in eval mode, after which it is in the mode it was found in. The weights along layers
    depend on what a layer holds, and on its number only through the slice that it is in. They start about
    the mean over layers, so that a layer on another level gets little, however much it tells.
    Raises ValueError if the encoder has other shapes, or heads do not fit.
    Source: Gaussian Adaptive Attention is All You Need, arXiv 2401.11143; pooling, W and gelu are ours.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        *,
        blocks: int = 3,
        heads: int = 4,
        gaussians: int = 5,
        norm_axis: int = 1,
        hidden: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("blocks", blocks), ("heads", heads), ("hidden", hidden)):
            check_positive(name, value)
        check_choice("norm_axis", norm_axis, (1, 3))
        config: Any = getattr(encoder, "config", None)
        for name in ("hidden_size", "num_hidden_layers"):
            if not isinstance(getattr(config, name, None), int):
                raise ValueError(f"encoder is {type(encoder).__name__}, must have a config with {name}")
        self.dim, self.depth, self.norm_axis = config.hidden_size, config.num_hidden_layers + 1, norm_axis
        most = (self.depth if norm_axis == 1 else self.dim) // 2
        if heads > most:
            raise ValueError(f"heads is {heads}, must be at most {most}: a slice has two numbers or more")
        self._encoder = (encoder,)  # in a tuple, which torch does not look into
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        axis = 1 if norm_axis == 1 else 2
        self.block = GaussianBlock(
            *(
                GaussianAdaptiveAttention(
                    self.dim, heads=heads, gaussians=gaussians, norm_axis=axis, **factory
                )
                for _ in range(blocks)
            )
        )
        self.inner = nn.Linear(self.dim, hidden, **factory)
        self.classifier = nn.Linear(hidden, classes, **factory)

    @property
    def encoder(self) -> nn.Module:
        """The encoder that was given."""
        return self._encoder[0]

    def forward(
        self,
        attention_mask: Shaped[Tensor, "b m"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        **inputs: Tensor,
    ) -> Float[Tensor, "b classes"]:
        """Logits.

        attention_mask  as the encoder takes it, and handed to it
        mask            tokens of the encoder's outputs that count; None: those of attention_mask
        inputs          all else that the encoder takes: input_ids, pixel_values, input_values, ...
        """
        s, mask = self._outputs(attention_mask, mask, inputs)
        h = self._unfold(self.block(self._fold(s)), s).mean(1)
        h = F.gelu(self.inner(h))
        count = mask[..., None].to(h.dtype)
        return self.classifier((h * count).sum(1) / count.sum(1).clamp(min=1))

    @torch.no_grad()
    def weights(
        self,
        attention_mask: Shaped[Tensor, "b m"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        **inputs: Tensor,
    ) -> tuple[list[Float[Tensor, "b layers n c"]], Bool[Tensor, "b layers n c"]]:
        """(attention weights of each layer of the block, where they belong to no padding).

        Both serve `heedful.inspect.importance_factor`; its axis 1 ranks the encoder's layers.
        """
        s, mask = self._outputs(attention_mask, mask, inputs)
        x, weights = self._fold(s), []
        layers: list[Any] = [*self.block.layers]
        for layer in layers:
            weights.append(self._unfold(layer.weights(x), s))
            x = layer(x) + x
        return weights, mask[:, None, :, None].expand_as(s)

    def _outputs(
        self, attention_mask: Tensor | None, mask: Tensor | None, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The stacked outputs of the encoder, padding set to zero, and the mask of their tokens."""
        more = {} if attention_mask is None else {"attention_mask": attention_mask}
        with torch.no_grad(), evaluating(self.encoder):
            output = self.encoder(**inputs, **more, output_hidden_states=True)
        states = getattr(output, "hidden_states", None) or ()
        shapes = sorted({tuple(state.shape) for state in states})
        if len(states) != self.depth or len(shapes) != 1 or shapes[0][2:] != (self.dim,):
            raise ValueError(
                f"encoder gives {len(states)} hidden_states of shapes {shapes}, "
                f"must give {self.depth} of one shape (batch, tokens, {self.dim})"
            )
        s = torch.stack(states, 1).to(self.inner.weight.dtype)
        if mask is None:
            mask = s.new_ones(s.shape[0], s.shape[2]) if attention_mask is None else attention_mask
            if mask.shape != (s.shape[0], s.shape[2]):
                raise ValueError(
                    f"mask is None and attention_mask has shape {tuple(mask.shape)}; with outputs of "
                    f"{s.shape[2]} tokens, mask must be given as (batch, {s.shape[2]})"
                )
            mask = mask.bool()
        check_mask("mask", mask, s.shape[0], s.shape[2])
        return s.masked_fill(~mask[:, None, :, None], 0.0), mask

    def _fold(self, s: Tensor) -> Tensor:
        """Rows in which the block's axis is that of tokens, or of channels."""
        return rearrange(s, "b l n c -> (b n) l c" if self.norm_axis == 1 else "b l n c -> (b l) n c")

    def _unfold(self, x: Tensor, like: Tensor) -> Tensor:
        if self.norm_axis == 1:
            return rearrange(x, "(b n) l c -> b l n c", b=like.shape[0])
        return rearrange(x, "(b l) n c -> b l n c", b=like.shape[0])
