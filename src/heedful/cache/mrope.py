"""Positions on three axes (time, height, width) as Qwen's vision models count them, and their rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import config_of
from heedful.cache.rerotate import rotation_of
from heedful.ops.rotary import rotate


def mrope_positions(
    video: Bool[Tensor, " n"], grids: Sequence[Sequence[int]], *, merge: int = 2, step: float = 2.0
) -> Float[Tensor, "3 n"]:
    """Positions (time, height, width) of a text with videos, from 0 on.

    Text tokens have the same position p, p + 1, ... on all axes. The tokens of a video that begins at p have
    (p + step * frame, p + row, p + column); the text goes on behind the largest of them.

    video  which tokens are of a video; as many as the grids have, frame by frame and row by row
    grids  (frames, height, width) of each video in patches, of which merge x merge make a token
    step   positions from frame to frame: seconds a frame times the positions of a second

    Raises ValueError if the tokens do not fit the grids. Source: StreamingVLM, arXiv 2510.09608.
    """
    wanted = sum(t * (h // merge) * (w // merge) for t, h, w in grids)
    if int(video.sum()) != wanted:
        raise ValueError(
            f"video marks {int(video.sum())} tokens, must mark the {wanted} of the grids {list(grids)}"
        )
    parts, place, start = [], 0, 0.0
    marked = video.tolist()
    for t, h, w in grids:
        first = marked.index(True, place)
        parts.append(start + torch.arange(first - place).float().expand(3, -1))
        start += first - place
        axes = torch.arange(t) * step, torch.arange(h // merge).float(), torch.arange(w // merge).float()
        grid = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
        parts.append(start + grid)
        start += float(grid.max()) + 1
        place = first + grid.shape[1]
    parts.append(start + torch.arange(len(marked) - place).float().expand(3, -1))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class MultiRotation:
    """How a model turns queries and keys by positions on one axis or on three.

    sections  how many pairs follow each axis; None: all pairs follow the only axis
    pairing   as in `heedful.ops.rotary.rotate`
    """

    frequency: Float[Tensor, " pairs"]
    sections: tuple[int, ...] | None
    pairing: str = "half"

    def turn(self, x: Float[Tensor, "b h n d"], positions: Float[Tensor, "axes b n"] | Tensor) -> Tensor:
        """Turn each token by its positions; by a difference of positions, to move it."""
        angles = positions[..., None].float() * self.frequency.to(x.device)
        if self.sections is not None and len(angles) > 1:
            pieces = angles.split(self.sections, dim=-1)
            return rotate(
                x, torch.cat([piece[i] for i, piece in enumerate(pieces)], -1), pairing=self.pairing
            )
        return rotate(x, angles[0], pairing=self.pairing)


def multi_rotation_of(model: PreTrainedModel | PreTrainedConfig) -> MultiRotation:
    """The rotation of a model's keys; a ValueError if its positions are not rotary."""
    config = config_of(model)
    told = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" not in told:
        found = rotation_of(model)
        return MultiRotation(found.frequency, None, found.pairing)
    if told.get("rope_type", "default") != "default":
        raise ValueError(
            f"model has rope_type {told['rope_type']!r}, must be 'default' for its keys to be moved"
        )
    if told.get("mrope_interleaved"):
        raise ValueError("model has interleaved M-RoPE sections, whose keys cannot be moved")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = told["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    return MultiRotation(frequency, tuple(told["mrope_section"]))
