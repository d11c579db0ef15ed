"""Visual attention redistribution: attention that goes to empty image tokens is given to the others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.hf.tap import Site, acts
from heedful.inspect.sinks import find_sink_dims, find_sink_tokens
from heedful.registry import register
from heedful.steer.intervention import Intervention, decoder_layers
from heedful.steer.vision import image_tokens


def redistribute(
    weights: Float[Tensor, "b h n m"],
    image: Bool[Tensor, "b m"],
    sinks: Bool[Tensor, "b m"],
    *,
    min_nonsink_ratio: float = 0.5,
    min_image_share: float = 0.2,
    keep: float = 0.6,
) -> tuple[Float[Tensor, "b h n m"], Bool[Tensor, "b h n"]]:
    """Move attention from sinks to the other image tokens, in rows that look at the image.

        share = sum_{image sinks} a / sum_{image} (a + 1e-6)
        chosen rows:  1 - share >= min_nonsink_ratio  and  sum_{image} a >= min_image_share
        a'_j = keep a_j for sinks;   a'_j = a_j (1 + (1 - keep) sum_{sinks} a / sum_{image, no sink} a) on
        the image

    weights  attention weights; rows keep their sums
    image    the image's tokens
    sinks    sink tokens, those of the text among them

    Gives the weights and which rows were chosen. A row whose image tokens are all sinks stays as it is.
    Source: arXiv 2503.03321.
    """
    on_image, on_sink = image[:, None, None], sinks[:, None, None]
    seen = weights.masked_fill(~on_image, 0.0)
    image_sum = seen.sum(-1)
    share = seen.masked_fill(~on_sink, 0.0).sum(-1) / (image_sum + 1e-6 * image.sum(-1)[:, None, None])
    rest = seen.masked_fill(on_sink, 0.0)
    rest_sum = rest.sum(-1, keepdim=True)
    chosen = (share <= 1 - min_nonsink_ratio) & (image_sum >= min_image_share)
    movable = chosen & (sinks & image).any(-1)[:, None, None] & (rest_sum[..., 0] > 0)
    freed = (1 - keep) * weights.masked_fill(~on_sink, 0.0)
    moved = (
        weights
        - freed
        + freed.sum(-1, keepdim=True) * rest / rest_sum.clamp_min(torch.finfo(rest.dtype).tiny)
    )
    return torch.where(movable[..., None], moved, weights), chosen


@register("visual-attention-redistribution", kind="steer", paper="var-visattnsink", tags=("image", "sink"))
@dataclass(eq=False)
class VisualAttentionRedistribution(Intervention):
    """Takes attention of image-centric heads off sink tokens and gives it to the other image tokens.

    Sinks are the prompt's tokens whose hidden state entering a layer is massive in `dims` (`sink_score` >
    threshold). See `redistribute` for what happens to the weights of the text after the image and of
    generated tokens.

    keep               share of its weight that a sink keeps; 1: nothing changes
    dims               channels of massive activations; None: the two largest of a row's first token
                       that is no padding, layer by layer
    threshold          tau, of the sink score
    min_nonsink_ratio  least share of a row's image attention that must lie off sinks
    min_image_share    least attention that a row must pay to the image
    first_layer        first layer with sinks
    skip_last_layer    whether the last layer is left alone
    image              (b, m) True at image tokens of the prompt; None: found by the model's image_token_id

    Source: arXiv 2503.03321.
    """

    keep: float = 0.6
    dims: Sequence[int] | None = None
    threshold: float = 20.0
    min_nonsink_ratio: float = 0.5
    min_image_share: float = 0.2
    first_layer: int = 2
    skip_last_layer: bool = True
    image: Bool[Tensor, "b m"] | None = None
    # By layer, of the prompt: what enters, until its sinks are found.
    _entering: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sinks: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep is {self.keep!r}, must lie in [0, 1]")

    @property
    def idle(self) -> bool:
        return self.keep == 1.0

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        for layer, block in enumerate(decoder_layers(model)):
            if self.first_layer <= layer < self.reading.layers - int(self.skip_last_layer):
                hook = block.register_forward_pre_hook(partial(self._look, layer), with_kwargs=True)
                stack.callback(hook.remove)

    def forget(self) -> None:
        self._entering.clear()
        self._sinks.clear()

    def _look(self, layer: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """At the prompt: note what enters this layer."""
        if layer not in self._sinks and acts(self.model, self):
            self._entering[layer] = args[0] if args else kwargs["hidden_states"]

    def _find_sinks(
        self, hidden: Float[Tensor, "b n c"], keys: Bool[Tensor, "#b m"] | None
    ) -> Bool[Tensor, "b n"]:
        """The sinks among a prompt's tokens, of which those that `keys` has False are padding."""
        if self.dims is not None or keys is None:
            return find_sink_tokens(hidden, dims=self.dims, threshold=self.threshold)
        first = keys.int().argmax(1).expand(hidden.shape[0]).tolist()
        rows = [
            find_sink_tokens(row[None], dims=find_sink_dims(row[begin:]), threshold=self.threshold)
            for row, begin in zip(hidden, first, strict=True)
        ]
        return torch.cat(rows)

    def weights(self, site: Site, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        if site.layer in self._entering:
            hidden = self._entering.pop(site.layer)
            self._sinks[site.layer] = self._find_sinks(hidden, site.visibility["key_mask"])
        sinks = self._sinks.get(site.layer)
        if sinks is None:
            return weights
        image = image_tokens(self.reading, self.image)
        image, sinks = (self.reading.on_keys(site, x) for x in (image, sinks))
        moved, _ = redistribute(
            weights,
            image,
            sinks,
            min_nonsink_ratio=self.min_nonsink_ratio,
            min_image_share=self.min_image_share,
            keep=self.keep,
        )
        place = torch.arange(weights.shape[-1], device=weights.device)
        last = torch.where(image, place, -1).amax(-1)  # of the image
        after = site.query_positions() > last[:, None]
        return torch.where(after[:, None, :, None], moved, weights)
