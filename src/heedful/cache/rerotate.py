"""Moving cached keys to other positions: turning rotated keys further."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import config_of
from heedful.ops.rotary import rotate


@dataclass(frozen=True)
class Rotation:
    """How a model turns its keys: the angle of pair j at position p is p frequency[j].

    pairing  as in `heedful.ops.rotary.rotate`
    """

    frequency: Float[Tensor, " pairs"]
    pairing: str

    def shift(self, key: Float[Tensor, "b h m d"], by: Int[Tensor, "b m"]) -> Float[Tensor, "b h m d"]:
        """Keys as they would be, had each stood `by` positions further on."""
        angles = by[..., None].float() * self.frequency.to(key.device)
        return rotate(key, angles, pairing=self.pairing)


def rotation_of(model: PreTrainedModel | PreTrainedConfig) -> Rotation:
    """The rotation of a model's keys, read from its rotary embedding by asking for the angles at position 1.

    Raises ValueError for a model whose positions are not rotary, are those of M-RoPE, or whose angles do not
    grow in proportion to one position.
    """
    if "mrope_section" in (getattr(config_of(model), "rope_parameters", None) or {}):
        raise ValueError(
            f"model is a {type(model).__name__} whose positions have three axes and do not count tokens; its "
            "cached keys cannot be moved by a number of tokens: use heedful.cache.StreamingVLMCache"
        )
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModel.from_config(model)
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith(("rotary_emb", "rotary_pos_emb")) and "vis" not in name
    ]
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__} without rotary positions; its cached keys cannot be moved"
        )
    rotary = type(found[0])(found[0].config)  # a fresh one: some change with the longest input seen
    # Where sliding layers turn at another speed, the question is about the full ones, which a policy rules.
    kind = {"layer_type": "full_attention"} if "layer_type" in signature(rotary.forward).parameters else {}
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, 3, 1, dtype=torch.float64), torch.tensor([[0, 1, 2]]), **kind)
    angles = torch.atan2(sin, cos)[0, 1]
    if cos.ndim != 3 or not torch.allclose(
        angles * 2, _unwrapped(sin[0, 2], cos[0, 2], angles * 2), atol=1e-5
    ):
        raise ValueError(
            f"model is a {type(model).__name__} whose rotary angles do not grow in proportion to one "
            "position; its cached keys cannot be moved"
        )
    half = angles.shape[-1] // 2
    interleaved = half > 1 and torch.equal(angles[0::2], angles[1::2])
    return Rotation(
        (angles[0::2] if interleaved else angles[:half]).float(), "interleaved" if interleaved else "half"
    )


def _unwrapped(sin: Tensor, cos: Tensor, near: Tensor) -> Tensor:
    """The angle with this sine and cosine that lies next to `near`."""
    angle = torch.atan2(sin, cos)
    return angle + 2 * torch.pi * ((near - angle) / (2 * torch.pi)).round()
