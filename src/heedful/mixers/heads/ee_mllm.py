"""Composite attention: visual tokens do not attend, text attends to all; the layer's weights align them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from heedful.checks import check_choice
from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.mixers.heads.visual_layer import VisualLayer
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.causal import Causal
from heedful.registry import register
from heedful.selection import TokenGroups

ALIGNERS = ("value", "ffn_only", "none")
_GROUP = 128  # text queries computed together


@register(
    "ee-mllm",
    kind="sequence",
    paper="ee-mllm",
    tags=("heads", "softmax", "multimodal"),
    aliases=("composite-attention",),
    causal="always",
    decode=True,
    extra_inputs=("visual",),
    complexity="O(T N C), T text tokens of N",
)
class CompositeAttentionLayer(VisualLayer):
    """A decoder layer that text tokens pass as ever, and visual tokens without attention.

        text:    h = x + W_o softmax(q k^T / sqrt(d)) v  over the tokens up to itself,  y = h + FFN(RMS(h))
        visual:  h = x + W_o v,                                                         y = h + FFN(RMS(h))

    where q, k, v are of RMS(x), q and k rotated. It is the plain layer under a mask in which a visual token
    sees itself alone (`patterns.Composite`, for images in front), so it has no weights of its own; queries
    and scores of visual tokens are not computed.

    dim          channels
    heads        query heads, a divisor of dim
    kv_heads     key and value heads, a divisor of `heads`; None: as many as `heads`
    hidden       channels inside the feed-forward net (SwiGLU); None: 4 dim
    aligner      what moves visual tokens on: "value", as above; "ffn_only": h = x; "none": y = x
    rotary_base  of the rotary embedding (channel j with j + d / 2)
    norm_eps     of both RMS normalisations

    forward: visual (b, n), True = a visual token, anywhere in the sequence and differently in each row; None:
    all tokens are text. mask (b, n) hides tokens as keys of text.
    Raises ValueError if heads do not divide, on wrong shapes, and for a context.
    Source: EE-MLLM, arXiv 2408.11795.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 32,
        kv_heads: int | None = None,
        hidden: int | None = None,
        aligner: str = "value",
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads=heads, kv_heads=kv_heads, hidden=hidden, norm_eps=norm_eps, **factory)
        check_choice("aligner", aligner, ALIGNERS)
        self.aligner, self.rotary_base = aligner, rotary_base
        kv_dim = self.kv_heads * self.head_dim
        self.query = nn.Linear(dim, dim, bias=False, **factory)
        self.key = nn.Linear(dim, kv_dim, bias=False, **factory)
        self.value = nn.Linear(dim, kv_dim, bias=False, **factory)
        self.out = nn.Linear(dim, dim, bias=False, **factory)
        self.ffn = SwiGLU(dim, hidden=self.hidden, **factory)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: KVState | None = None,
        visual: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], KVState]:
        self.door(x, context, mask, context_mask, positions, visual)
        past = 0 if state is None else state.length
        angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
        # 1. Keys and values of all tokens.
        u = self.attention_norm(x)
        key, value = (
            rearrange(y, "b n (g d) -> b g n d", g=self.kv_heads) for y in (self.key(u), self.value(u))
        )
        key, own, seen = rotate(key, angles), value, mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        # 2. Text asks; 3. visual tokens take their own value, which is all that they would see.
        if visual is None:
            heads = attention(self._queries(u, angles), key, value, pattern=Causal(), key_mask=seen)
        else:
            own = own.repeat_interleave(self.heads // self.kv_heads, dim=1)
            heads = self._composite(u, angles, key, value, own, seen, visual, past)
        h = x + self.out(rearrange(heads, "b h n d -> b n (h d)"))
        y = h + self.ffn(self.ffn_norm(h))
        if visual is not None and self.aligner == "none":
            y = torch.where(visual[..., None], x, y)
        return y if state is None else (y, state)

    def _queries(self, u: Tensor, angles: Tensor) -> Float[Tensor, "b h n d"]:
        return rotate(rearrange(self.query(u), "b n (h d) -> b h n d", h=self.heads), angles)

    def _composite(
        self,
        u: Float[Tensor, "b n c"],
        angles: Float[Tensor, "*rows n pairs"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m d"],
        own: Float[Tensor, "b h n d"],
        seen: Bool[Tensor, "b m"] | None,
        visual: Bool[Tensor, "b n"],
        past: int,
    ) -> Float[Tensor, "b h n d"]:
        """Attention for the text rows, put among the values of the visual ones."""
        place, live = text_places(visual)
        rows = angles.expand(*place.shape[:1], -1, -1) if angles.ndim == 2 else angles
        rows = rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))
        query = self._queries(u.gather(1, place[..., None].expand(-1, -1, u.shape[-1])), rows)
        attended = attention(
            query, key, value, pattern=_groups(place + past, live, key.shape[2]), key_mask=seen
        )
        if self.aligner != "value":
            own = torch.zeros_like(own)
        where = place[:, None, :, None].expand_as(attended)
        mixed = torch.where(live[:, None, :, None], attended.to(own.dtype), own.gather(2, where))
        return own.scatter(2, where, mixed)


def text_places(visual: Bool[Tensor, "b n"]) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Where the text tokens of each row stand, in order, and which of the t places are filled."""
    n = visual.shape[1]
    count = (~visual).sum(1)
    # A compiler cannot follow a length that depends on the data: there all places are kept.
    most = n if torch.compiler.is_compiling() or not visual.numel() else int(count.max())
    place = visual.long().argsort(dim=1, stable=True)[:, :most]
    return place, torch.arange(most, device=visual.device) < count[:, None]


def _groups(place: Int[Tensor, "b t"], live: Bool[Tensor, "b t"], keys: int) -> TokenGroups:
    """Runs of text queries, each of which sees the keys up to its own place."""
    b, t = place.shape
    rows = torch.arange(t, device=place.device).masked_fill(~live, -1)
    rows = nn.functional.pad(rows, (0, -t % _GROUP), value=-1).view(b, 1, -(-t // _GROUP), _GROUP)
    columns = torch.arange(keys, device=place.device).expand(1, 1, rows.shape[2], -1)
    return TokenGroups(rows, columns, (t, keys), lambda b, h, q, k: k <= place[b, q])
