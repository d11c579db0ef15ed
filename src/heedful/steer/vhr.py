"""Vision-aware head reinforcement: heads that the image moves most are turned up."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.hf.tap import Handler, Site, alone
from heedful.inspect.vision_head_divergence import vision_head_divergence
from heedful.registry import register
from heedful.steer.intervention import Intervention, decoder_layers
from heedful.steer.vision import image_tokens, without

# (model type, layers): the reinforced layers of the paper
PUBLISHED: dict[tuple[str, int], Sequence[int]] = {
    ("llava", 32): (1, *range(18, 32)),
    ("llava_next", 32): (1, *range(18, 32)),
    ("instructblip", 32): range(14, 32),
}


def head_gains(
    seen: Float[Tensor, "b h d"], unseen: Float[Tensor, "b h d"], alpha: float, *, outliers: bool = False
) -> Float[Tensor, "b h"]:
    """alpha for heads whose divergence is above the layer's median (the lower one of two), 1 for the others.

    Source: arXiv 2412.13949.
    """
    divergence = vision_head_divergence(seen, unseen, outliers=outliers)
    chosen = divergence > divergence.median(-1, keepdim=True).values
    return torch.where(chosen, alpha, 1.0).to(seen.dtype)


class _Reinforce(Handler):
    """In a forward without the image: finds the gains of a layer, and applies them."""

    def __init__(self, owner: VisionHeadReinforcement, layer: int, seen: Float[Tensor, "b h d"]) -> None:
        self.owner, self.layer, self.seen = owner, layer, seen
        self.gains: Float[Tensor, "b h"]

    def wants(self, site: Site) -> bool:
        return Intervention.wants(self.owner, site) and site.layer == self.layer

    def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        owner = self.owner
        self.gains = head_gains(self.seen, output[:, :, -1], owner.alpha, outliers=not owner.outlier_rule)
        return output * self.gains[:, :, None, None]


@register("vision-head-reinforcement", kind="steer", paper="vhr", tags=("image", "heads"), aliases=("vhr",))
@dataclass(eq=False)
class VisionHeadReinforcement(Intervention):
    """Multiplies the output of those heads by alpha that the image moves most, chosen for each sample.

    At the prompt, layer by layer, the heads' outputs at the last position are compared with those for the
    prompt without image tokens (`vision_head_divergence`); heads above the median are turned up in both, at
    all positions, and stay so while tokens are generated.

    alpha         1: nothing changes
    layers        changed layers; None: the paper's for the model
    outlier_rule  whether heads that surge without the image are left out
    image         (b, m) True at image tokens of the prompt; None: found by the model's image_token_id

    The prompt is padded on the left, if at all. It costs up to two forwards of the prompt's text.
    Raises ValueError if the image tokens or the layers are neither known nor given. Source: VHR, arXiv
    2412.13949.
    """

    alpha: float = 2.0
    layers: Sequence[int] | None = None
    outlier_rule: bool = True
    image: Bool[Tensor, "b m"] | None = None

    def __post_init__(self) -> None:
        self._gains: dict[int, Float[Tensor, "b h"]] = {}
        self._text: list[tuple[tuple, dict[str, Any]]] = []  # what each block is given without the image
        self._next, self._hidden = 0, torch.empty(0)  # how far the forward without the image has come

    @property
    def idle(self) -> bool:
        return self.alpha == 1.0

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        key = (model.config.model_type, self.reading.layers)
        layers = PUBLISHED.get(key) if self.layers is None else self.layers
        if layers is None:
            raise ValueError(
                f"layers is None, must be given: the paper has none for a {key[0]!r} of {key[1]} layers"
            )
        self._layers, self._blocks = sorted(layers), decoder_layers(model)
        hook = model.register_forward_pre_hook(self._read_without_image, with_kwargs=True)
        stack.callback(hook.remove)

    def forget(self) -> None:
        self._gains.clear()
        self._text.clear()

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.layer in self._layers

    def _read_without_image(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """At the prompt: note what the blocks are given for its text alone."""
        if self._gains:
            return
        image = image_tokens(self.reading, self.image)
        ids, mask = without(image, self.reading.ids, kwargs.get("attention_mask"))
        self._text = [((), {})] * len(self._blocks)

        def note(index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._text[index] = (args, kwargs)

        with ExitStack() as stack:
            stack.enter_context(alone(self.model))
            for index, block in enumerate(self._blocks):
                hook = block.register_forward_pre_hook(partial(note, index), with_kwargs=True)
                stack.callback(hook.remove)
            places = (mask.cumsum(1) - 1).clamp_min(0)
            self.model.forward(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        self._next = self._layers[0]  # up to there nothing will have changed
        args, kwargs = self._text[self._next]
        self._hidden = args[0] if args else kwargs["hidden_states"]

    def output(self, site: Site, output: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        if site.layer not in self._gains:
            self._gains[site.layer] = self._compare(site.layer, output[:, :, -1])
        return output * self._gains[site.layer][:, :, None, None]

    def _compare(self, layer: int, seen: Float[Tensor, "b h d"]) -> Float[Tensor, "b h"]:
        """Go on without the image up to this layer, and find the gains there."""
        reinforce = _Reinforce(self, layer, seen)
        with alone(self.model, reinforce):
            for index in range(self._next, layer + 1):
                args, kwargs = self._text[index]
                if args:
                    args = (self._hidden, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": self._hidden}
                given = self._blocks[index].forward(*args, **kwargs)
                self._hidden = given[0] if isinstance(given, tuple) else given
        self._next = layer + 1
        return reinforce.gains
