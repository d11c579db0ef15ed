"""Another attention in a vision transformer of timm."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from heedful.registry import create, find


class OnPatches(nn.Module):
    """A mixer of maps among the tokens of an image's patches, row by row."""

    def __init__(self, mixer: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.mixer = mixer
        self.grid = grid

    def forward(self, x: Float[Tensor, "b n c"], **_: Any) -> Float[Tensor, "b n c"]:
        height, width = self.grid
        if x.shape[1] != height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, must have {height} x {width}, the patches of the image"
            )
        return self.mixer(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


class OnTokens(nn.Module):
    """A mixer of sequences in the place of timm's attention, whose further arguments are None here."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Float[Tensor, "b n c"], **_: Any) -> Float[Tensor, "b n c"]:
        return self.mixer(x)


def replace_attention(model: nn.Module, name: str, **arguments: Any) -> nn.Module:
    """Put the mixer `name` in the place of every attention of a timm vision transformer, in place.

    The new mixers are freshly initialised. A sequence mixer sees all tokens; a grid mixer the map of
    patches, so the model must have no class or register tokens (timm: class_token=False, global_pool="avg").

    model      a model with `blocks` that have `attn`, as timm's VisionTransformer
    arguments  of the mixer; heads is by default that of the attention it replaces

    Raises ValueError for other models, for mixers of other kinds, and where a map cannot hold the tokens;
    the model is then left as it was.
    """
    entry = find(name)
    if entry.kind not in ("sequence", "grid"):
        raise ValueError(f"{name!r} is a {entry.kind} mixer, must be a sequence or a grid mixer")
    blocks = getattr(model, "blocks", None)
    if blocks is None or not all(hasattr(block, "attn") for block in blocks):
        raise ValueError(f"model is a {type(model).__name__}, must have blocks with attn, as timm's ViT has")
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if entry.kind == "grid" and prefix:
        raise ValueError(
            f"model has {prefix} class or register tokens, must have none for {name!r}, which mixes maps; "
            'create it with class_token=False, global_pool="avg"'
        )
    made: list[nn.Module] = []
    for block in blocks:
        old = block.attn
        like = next(old.parameters())
        how = {"heads": old.num_heads} if "heads" in inspect.signature(entry.load()).parameters else {}
        dim = old.qkv.in_features if hasattr(old, "qkv") else int(model.embed_dim)  # type: ignore[arg-type]
        mixer = create(name, dim, **{**how, **arguments}).to(like.device, like.dtype)
        mixer.train(old.training)
        if entry.kind == "sequence":
            made.append(OnTokens(mixer))
        else:
            height, width = model.patch_embed.grid_size  # type: ignore[union-attr, misc]
            made.append(OnPatches(mixer, (height, width)))
    for block, new in zip(blocks, made, strict=True):
        block.attn = new
    return model
