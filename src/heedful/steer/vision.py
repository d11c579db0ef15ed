"""What a vision tower's class token looks at, brought to the image tokens of the prompt."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from heedful.hf.attention import Visible
from heedful.hf.tap import Site
from heedful.steer.intervention import Reading

_CLASS_TOKEN = re.compile(r"(?:cls|class)_(?:token|emb)")


class VisionTower:
    """Where the attention of a model's vision tower is: `prefix` of its modules, number of `layers`.

    Raises ValueError if the model has no vision tower of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = getattr(model.config, "vision_config", None)
        if config is None:
            raise ValueError(
                f"model is a {type(model).__name__}, must have a vision tower (a vision_config), "
                "whose class token says which image tokens matter; else tell the tokens"
            )
        towers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, PreTrainedModel) and isinstance(module.config, type(config))
        ]
        if not towers:
            raise ValueError(f"model is a {type(model).__name__}, whose vision tower was not found")
        self.prefix = towers[0] + "."
        layers = getattr(config, "num_hidden_layers", getattr(config, "depth", None))
        if layers is None:
            raise ValueError("the vision_config does not tell the number of layers (num_hidden_layers)")
        self.layers = int(layers)
        self._model = type(model).__name__
        tower = model.get_submodule(towers[0])
        self._named = any(_CLASS_TOKEN.search(name) for name, _ in tower.named_parameters())
        size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        self._patches = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None

    def owns(self, site: Site) -> bool:
        """Whether an attention call is one of the vision tower."""
        return site.name.startswith(self.prefix)

    def check_class_token(self, site: Site, instead: str = "") -> None:
        """Raises ValueError if no class token stands before the patches of a call of the tower.

        There is one if a parameter is named after it, or if the call has one token more than an image of the
        configured size has patches.
        """
        tokens = site.key.shape[2]
        if not self._named and (self._patches is None or tokens != self._patches + 1):
            raise ValueError(
                f"the vision tower of {self._model} must have a class token: "
                f"none is among its parameters, and its {tokens} tokens are patches" + instead
            )


class ClassNotes:
    """What a class token looked at, image by image, in some layers of a vision tower.

    Notes stay until other images are encoded: images may be encoded before the prompt is read, and the prompt
    may be read more than once.
    """

    def __init__(self) -> None:
        self._notes: dict[int, list[Float[Tensor, "images t"]]] = {}
        self._told = False

    def add(self, layer: int, attention: Float[Tensor, "images t"]) -> None:
        """Note the attention to the patches of more images."""
        if self._told:
            self.clear()
        self._notes.setdefault(layer, []).append(attention)

    def of(self, layer: int) -> Float[Tensor, "images t"]:
        """All notes of a layer. Raises ValueError if there are none."""
        if layer not in self._notes:
            raise ValueError("the images were encoded outside the context, must be encoded inside it")
        self._told = True
        return torch.cat(self._notes[layer])

    def clear(self) -> None:
        """Forget everything."""
        self._notes, self._told = {}, False


def image_tokens(
    reading: Reading, given: Bool[Tensor, "b k"] | None, name: str = "image"
) -> Bool[Tensor, "rows m"]:
    """The image tokens read so far: as given for the prompt (by the argument `name`), else as configured."""
    if given is None:
        return reading.of("image_token_id", "image_token_index")
    rows, read = reading.ids.shape
    told = for_beams(given, rows)
    if told.shape[0] != rows or told.shape[1] > read:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, must have the {rows} rows of the prompt "
            f"and at most the {read} tokens read"
        )
    return torch.nn.functional.pad(told.to(reading.ids.device), (0, read - told.shape[1]))


def for_beams(given: Tensor, rows: int) -> Tensor:
    """What is told of the rows of a prompt, for the several that beam search has in place of each."""
    return given.repeat_interleave(max(rows // given.shape[0], 1), dim=0)


def on_tokens(patches: Float[Tensor, "images t"], image: Bool[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """Values of patches at the image tokens they became, in order; 0 at text.

    Rows may be several in place of each row whose images the tower saw, as beam search has it.
    Raises ValueError unless there is one token for each patch.
    """
    count, rows = int(image.sum()), image.shape[0]
    beams = max(count // patches.numel(), 1)
    if count != beams * patches.numel() or rows % beams:
        raise ValueError(
            f"the vision tower has {patches.numel()} patches ({patches.shape[0]} images of "
            f"{patches.shape[1]}), must be as many as the image tokens of the prompt, which are {count}"
        )
    image = image[::beams].to(patches.device)
    return patches.new_zeros(image.shape).masked_scatter(image, patches).repeat_interleave(beams, dim=0)


def without(
    image: Bool[Tensor, "b m"], ids: Int[Tensor, "b m"], mask: Any
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Token ids without those of the image, padded on the left, and their attention mask.

    Raises ValueError if the prompt's mask is no table of 0 and 1 for its tokens.
    """
    keep = ~image
    if mask is not None:
        keep = keep & check_padding(mask, ids).bool()
    length = max(int(keep.sum(1).max()), 1)
    order = keep.int().argsort(dim=1, stable=True)[:, -length:]
    return ids.gather(1, order), keep.gather(1, order).long()


def check_padding(mask: Any, ids: Int[Tensor, "b m"]) -> Tensor:
    """The mask of a prompt, which has an entry for each token. Raises ValueError for another one."""
    mask = as_given(mask, ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        told = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {told}, must have the shape {tuple(ids.shape)} of the prompt")
    return mask


def as_given(mask: Any, ids: Int[Tensor, "b m"]) -> Any:
    """The mask of a prompt as it was before `generate` prepared it for the places of a static cache."""
    if isinstance(mask, dict):  # by kind of layer; at the prompt all know its padding
        mask = next(iter(mask.values()))
    if not isinstance(mask, Visible):
        return mask
    known = mask.key_mask
    return torch.ones_like(ids) if known is None else known[:, : ids.shape[1]].expand(ids.shape).long()
