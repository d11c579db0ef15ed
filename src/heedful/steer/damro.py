"""Contrast with a stream that sees nothing of the image but its outlier patches."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.hf.tap import Site, acts
from heedful.registry import register
from heedful.steer.contrastive import ContrastiveLogits
from heedful.steer.vision import (
    ClassNotes,
    VisionTower,
    check_padding,
    image_tokens,
    on_tokens,
)


def class_attention(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"], *, split: bool = False
) -> Float[Tensor, "b t"]:
    """The attention of the class token to the patches, n = 1 + t, for queries and keys before scaling.

        not split:  softmax(sum_h q_h . k_h / sqrt(h d)), as if all heads were one
        split:      the mean over heads of softmax(q_h . k_h / sqrt(d))

    Source: arXiv 2410.04514.
    """
    logits = query[:, :, :1] @ key.transpose(-2, -1)
    if split:
        weights = (logits * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    else:
        weights = (logits.sum(1) * (query.shape[1] * query.shape[-1]) ** -0.5).softmax(-1)
    return weights[:, 0, 1:]


def outlier_places(
    attention: Float[Tensor, "images t"], image: Bool[Tensor, "b m"], keep: Bool[Tensor, "b m"], k: int
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Which tokens make up a prompt with the k most attended patches of each image, and which of them count.

    The patches stand where the image stood, the most attended first; rows are padded on the left.

    attention  of the class token, image by image
    keep       False = padding
    """
    t = attention.shape[1]
    if k > t:
        raise ValueError(f"k is {k}, must be at most {t}, the patches of an image")
    rank = attention.argsort(dim=1, descending=True).argsort(dim=1)
    within = torch.arange(t, device=rank.device).expand_as(rank)
    rank, within = (on_tokens(x.double(), image).long() for x in (rank, within))
    place = torch.arange(image.shape[1], device=rank.device)
    key = torch.where(image, place - within + rank, place)  # an image's first place, and on by rank
    keep = keep & (~image | (rank < k))
    length = max(int(keep.sum(1).max()), 1)
    order = torch.where(keep, key, -1).argsort(dim=1, stable=True)[:, -length:]
    return order, keep.gather(1, order)


@register(
    "outlier-token-contrast", kind="steer", paper="damro", tags=("image", "decoding"), aliases=("damro",)
)
@dataclass(eq=False)
class OutlierTokenContrast(ContrastiveLogits):
    """Prefers tokens less that follow from the image's outlier patches alone.

        z = (1 + alpha) l - alpha l(outliers);   z = -inf where l < log(beta) + max l

    Outliers are the k patches that the vision tower's class token attends to most in its layer before the
    last, found in the same forward; the other stream has their features, most attended first, in place of
    the image.

    alpha  0: nothing changes but for the cut
    k      outliers of an image
    beta   of the cut; 0: no token is cut
    heads  "merged" as published for CLIP towers: one softmax over the full width; "mean": the true heads
    image  (b, m) True at image tokens of the prompt; None: found by the model's image_token_id

    Raises ValueError if there is no vision tower with a class token, or not one image token a patch. Source:
    DAMRO, arXiv 2410.04514.
    """

    alpha: float = 2.0
    k: int = 10
    beta: float = 0.1
    heads: Literal["merged", "mean"] = "merged"
    image: Bool[Tensor, "b m"] | None = None
    own_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("k", self.k)
        check_choice("heads", self.heads, ("merged", "mean"))
        self._class = ClassNotes()
        self._embeds: Tensor | None = None

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        super().enter(model, stack)
        self._tower = VisionTower(model)
        self._class.clear()
        hook = model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)
        stack.callback(hook.remove)

    def forget(self) -> None:
        super().forget()
        self._embeds = None

    def wants(self, site: Site) -> bool:
        return self._tower.owns(site) and site.layer == self._tower.layers - 2

    def see(self, site: Site) -> None:
        self._tower.check_class_token(site)
        self._class.add(site.layer, class_attention(site.query, site.key, split=self.heads == "mean"))

    def _note(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """At the prompt: what the decoder is given, image features in their places."""
        if not self._begun and acts(self.model, self):
            self._embeds = kwargs.get("inputs_embeds")

    def other(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids, mask, embeds = self.reading.ids, inputs.get("attention_mask"), self._embeds
        image = image_tokens(self.reading, self.image)
        if embeds is None:
            raise ValueError(f"{type(self.model).__name__} must hand its decoder inputs_embeds")
        keep = torch.ones_like(image) if mask is None else check_padding(mask, ids).bool()
        if image.any():
            attention = self._class.of(self._tower.layers - 2).to(ids.device)
            place, real = outlier_places(attention, image, keep, self.k)
        else:
            place, real = torch.arange(ids.shape[1], device=ids.device).expand_as(ids), keep
        self._embeds = None
        return {
            "inputs_embeds": embeds.gather(1, place[..., None].expand(-1, -1, embeds.shape[2])),
            "attention_mask": real.long(),
            "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
        }
