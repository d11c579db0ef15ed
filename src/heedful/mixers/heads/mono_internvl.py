"""Modality experts: visual tokens have weights of their own inside the layers of a language model."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.mixers.heads.self_attention import next_angles
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.mixers.heads.visual_layer import VisualLayer
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.causal import Causal
from heedful.registry import register


class ModalityExperts(nn.Module):
    """A layer twice, for text tokens and for visual tokens: every token goes through its own one alone.

        y_t = visual(x_t) if token t is visual, else text(x_t)

    text: the layer of text tokens, any module on (tokens, c). That of visual tokens starts as a copy of it,
    so that the model is at first what it was without experts. To train the visual part alone, freeze `text`.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.visual = copy.deepcopy(text)

    def forward(
        self, x: Float[Tensor, "b n c"], visual: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n e"]:
        if visual is None:
            return self.text(x)
        flat, is_visual = x.flatten(0, 1), visual.flatten()
        words, patches = (~is_visual).nonzero()[:, 0], is_visual.nonzero()[:, 0]
        of_words, of_patches = self.text(flat[words]), self.visual(flat[patches])
        y = of_words.new_zeros(flat.shape[0], of_words.shape[-1])
        return y.index_copy(0, words, of_words).index_copy(0, patches, of_patches).unflatten(0, x.shape[:2])


@register(
    "mono-internvl",
    kind="sequence",
    paper="mono-internvl",
    tags=("heads", "softmax", "experts", "multimodal"),
    aliases=("modality-experts",),
    causal="always",
    decode=True,
    extra_inputs=("visual",),
    complexity="O(N^2 C)",
)
class ModalityExpertLayer(VisualLayer):
    """A decoder layer in which visual tokens have their own feed-forward net and, if wanted, projections.

        h = x + W_o attention(RMS(x) W_qkv),   y = h + FFN_m(RMS(h)),   m: text or visual

    One causal attention runs over all tokens. With attention_experts W_qkv and W_o depend on m, too.

    dim                channels
    heads              query heads, a divisor of dim
    kv_heads           key and value heads, a divisor of `heads`; None: as many as `heads`
    hidden             channels inside the feed-forward nets (SwiGLU); None: 4 dim
    attention_experts  visual tokens have their own W_qkv and W_o (version 1.5)
    rotary_base        of the rotary embedding (channel j with j + d / 2)
    norm_eps           of both RMS normalisations

    The rows of W_qkv stand KV head after KV head: its queries, its key, its value. The visual weights start
    as copies of those for text.

    forward: visual (b, n), True = a visual token; None: all tokens are text. It is given with each piece of a
    sequence, so visual tokens may also come late. mask (b, n) hides tokens as keys.
    Raises ValueError if heads do not divide, on wrong shapes, and for a context.
    Source: Mono-InternVL, arXiv 2410.08202; Mono-InternVL-1.5, arXiv 2507.12566.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "kv_heads": 2, "attention_experts": True}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        kv_heads: int | None = None,
        hidden: int | None = None,
        attention_experts: bool = False,
        rotary_base: float = 1000000.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads=heads, kv_heads=kv_heads, hidden=hidden, norm_eps=norm_eps, **factory)
        self.attention_experts, self.rotary_base = attention_experts, rotary_base
        qkv: nn.Module = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False, **factory)
        out: nn.Module = nn.Linear(dim, dim, bias=False, **factory)
        self.qkv = ModalityExperts(qkv) if attention_experts else qkv
        self.out = ModalityExperts(out) if attention_experts else out
        self.ffn = ModalityExperts(SwiGLU(dim, hidden=self.hidden, **factory))

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
        # 1. One causal attention over text and visual tokens.
        qkv = _own(self.qkv, self.attention_norm(x), visual)
        grouped = rearrange(qkv, "b n (g r d) -> b g r n d", g=self.kv_heads, d=self.head_dim)
        query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        angles = next_angles(x, self.head_dim, positions, state, base=self.rotary_base)
        query, key = rotate(query, angles), rotate(key, angles)
        seen = mask
        if state is not None:
            state = state.append(key, value, mask)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        heads = attention(query, key, value, pattern=Causal(), key_mask=seen)
        h = x + _own(self.out, rearrange(heads, "b h n d -> b n (h d)"), visual)
        # 2. The feed-forward net of each token's kind.
        y = h + self.ffn(self.ffn_norm(h), visual)
        return y if state is None else (y, state)


def _own(layer: nn.Module, x: Tensor, visual: Tensor | None) -> Tensor:
    return layer(x, visual) if isinstance(layer, ModalityExperts) else layer(x)
