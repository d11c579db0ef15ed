"""ChAda-ViT: images with different numbers of channels in one batch, all their patches attending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_positive, check_tokens
from heedful.models.backbone import head
from heedful.models.channel_tokens import ChannelPatches, stretch_table
from heedful.models.parts import drop_path_rates, init_linear
from heedful.ops.attention import attention
from heedful.registry import register

CONFIGS = {
    "chada_vit_192": {"parameters": 11_341_632, "arguments": {}},
    "chada_vit_384": {"parameters": 26_197_632, "arguments": {"dim": 384}},
}


class ChAdaLayer(nn.Module):
    """A layer with norms before the attention and after both parts, the first of them used twice.

        x = LN1(x + W_o softmax(q k^T / sqrt(d)) v),   q, k, v from LN1(x)
        x = LN2(x + W_2 relu(W_1 x))

    dim      channels
    heads    a divisor of dim
    hidden   inner width
    dropout  of attention weights, of the inner layer and of what both parts add

    forward: x (b, n, c), mask (b, n) with True = may be seen.
    Source: ChAda-ViT, arXiv 2311.15264, as released.
    """

    def __init__(self, dim: int, *, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.dim, self.heads, self.rate = dim, heads, dropout
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        return q, k, v

    def attention_maps(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b h n n"]:
        """The weights of every head: row i says how much query i takes from each token."""
        query, key, _ = self._project(x)
        logits = query @ key.mT / (self.dim // self.heads) ** 0.5
        if mask is None:
            return logits.softmax(-1)
        hidden = ~mask[:, None, None]
        # The lowest finite logit, not -inf: a row that sees nothing gives zeros.
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        query, key, value = self._project(x)
        y = attention(query, key, value, key_mask=mask, dropout_p=self.rate if self.training else 0.0)
        assert isinstance(y, Tensor)
        x = self.norm1(x + self.dropout(self.out(rearrange(y, "b h n d -> b n (h d)"))))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


@register(
    "chada-vit",
    kind="model",
    paper="chada-vit",
    tags=("image", "channels", "dense"),
    complexity="O((C P)^2)",
)
class ChAdaViT(nn.Module):
    """Vision transformer over the patches of every channel, for images with any numbers of channels.

        t_cp = W patch_cp + b + channel_c + position_p          for the patches p of the c-th channel
        x = layers([class + position_0, t_11 .. t_1P, t_21 ..])    padded and masked to the most channels
        y = head(LN(x)_class)

    classes        outputs of the head; 0: none, the class token comes out
    max_channels   the largest number of channels of an image
    dim            channels of tokens
    depth          layers (`ChAdaLayer`)
    heads          of each layer
    hidden         inner width of each layer
    image_size     side of the images trained on
    patch          side of a patch, in pixels
    dropout        of the tokens that enter the first layer
    layer_dropout  dropout inside the last layer, growing from 0

    forward: x (s, 1, height, width), the channels of all images one after the other, and `counts`, how many
    of them each image has. Raises ValueError if heads or the patch do not divide, on wrong shapes, and on
    counts that do not add up to s or are not in 1 .. max_channels.
    Source: ChAda-ViT, arXiv 2311.15264.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "max_channels": 4,
        "dim": 12,
        "depth": 2,
        "heads": 3,
        "hidden": 20,
        "image_size": 16,
        "patch": 4,
    }

    def __init__(
        self,
        *,
        classes: int = 0,
        max_channels: int = 10,
        dim: int = 192,
        depth: int = 12,
        heads: int = 2,
        hidden: int = 2048,
        image_size: int = 224,
        patch: int = 16,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("max_channels", max_channels)
        check_divides("patch", patch, "image_size", image_size)
        self.max_channels, self.side = max_channels, image_size // patch
        self.patches = ChannelPatches(dim, patch=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.channels = nn.Parameter(torch.zeros(max_channels, dim))
        self.positions = nn.Parameter(torch.zeros(1 + self.side**2, dim))
        self.dropout = nn.Dropout(dropout)
        (rates,) = drop_path_rates((depth,), layer_dropout)
        self.layers = nn.ModuleList(
            ChAdaLayer(dim, heads=heads, hidden=hidden, dropout=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = head(dim, classes)
        self.apply(init_linear)
        for layer in self.layers:
            assert isinstance(layer, ChAdaLayer)
            nn.init.xavier_uniform_(layer.qkv.weight)
        for table in (self.class_token, self.channels, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def embed(
        self, x: Float[Tensor, "s 1 height width"], counts: Sequence[int] | Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """The tokens that enter the first layer, class token first, and which of them are no padding."""
        # 1. Patches of every channel.
        told = self._counted(x, counts)
        size = self.patches.size(x)
        tokens = self.patches(x[:, 0])
        # 2. Images with fewer channels than the largest get zeros, which nobody sees.
        most = max(told)
        places = [row * most + slot for row, count in enumerate(told) for slot in range(count)]
        padded = tokens.new_zeros(len(told) * most, *tokens.shape[1:])
        padded = padded.index_copy(0, torch.tensor(places, device=x.device), tokens)
        padded = padded.unflatten(0, (len(told), most))
        seen = torch.arange(most, device=x.device) < torch.tensor(told, device=x.device)[:, None]
        # 3. Whose they are, and where.
        first, grid = self.positions.split((1, self.side**2))
        if size != (self.side, self.side):
            grid = stretch_table(grid, self.side, size)
        padded = padded + grid + self.channels[:most, None]
        # 4. The class token.
        class_token = (self.class_token + first).expand(len(seen), -1, -1)
        mask = F.pad(seen.repeat_interleave(len(grid), 1), (1, 0), value=True)
        return self.dropout(torch.cat([class_token, padded.flatten(1, 2)], dim=1)), mask

    def tokens(
        self, x: Float[Tensor, "s 1 height width"], counts: Sequence[int] | Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """The normed tokens behind the last layer, class token first, and which of them are no padding."""
        tokens, mask = self.embed(x, counts)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return self.norm(tokens), mask

    def patch_tokens(
        self, x: Float[Tensor, "s 1 height width"], counts: Sequence[int] | Int[Tensor, " b"]
    ) -> Float[Tensor, "t d"]:
        """The normed tokens of all patches of all channels of all images, one after the other."""
        tokens, mask = self.tokens(x, counts)
        return tokens[:, 1:][mask[:, 1:]]

    def attention_maps(
        self, x: Float[Tensor, "s 1 height width"], counts: Sequence[int] | Int[Tensor, " b"]
    ) -> Float[Tensor, "b h n n"]:
        """The weights of the last layer; a token of padding takes no weight."""
        tokens, mask = self.embed(x, counts)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, mask)
        last = self.layers[-1]
        assert isinstance(last, ChAdaLayer)
        return last.attention_maps(tokens, mask)

    def forward(
        self, x: Float[Tensor, "s 1 height width"], counts: Sequence[int] | Int[Tensor, " b"]
    ) -> Float[Tensor, "b k"]:
        return self.head(self.tokens(x, counts)[0][:, 0])

    def _counted(self, x: Tensor, counts: Sequence[int] | Tensor) -> list[int]:
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be (channels, 1, height, width)")
        told = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        if not told or sum(told) != len(x) or not 1 <= min(told) <= max(told) <= self.max_channels:
            raise ValueError(
                f"counts is {told}, must be numbers from 1 to {self.max_channels} with sum {len(x)}, as in x"
            )
        return told

    def example_inputs(
        self, *, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Keyword arguments for a small `forward` call."""
        counts = (self.max_channels, 1, min(2, self.max_channels))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(sum(counts), 1, *size, generator=generator, dtype=torch.float64)
        return {"x": x.to(dtype), "counts": counts}
