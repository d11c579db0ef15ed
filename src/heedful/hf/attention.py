"""The attention implementation "heedful" of transformers, and patterns inside it.

The model's own visibility (causal order, padding, sliding windows, packed sequences) is kept and travels
to the kernels as a pattern and a key mask; tables of n x m entries are held only for masks that the
caller or the model made as such a table. A pattern given by `use_pattern` narrows what the model sees.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import masking_utils as masking
except ModuleNotFoundError as missing:
    raise ImportError("heedful.hf needs transformers 5: pip install 'heedful[hf]'") from missing

from heedful.inspect.site import Visibility
from heedful.ops.attention import attention
from heedful.patterns import Causal, Full, Pattern, Window

NAME = "heedful"

Choice = Pattern | Mapping[int, Pattern | None] | Callable[[nn.Module], Pattern | None]


@contextmanager
def use_pattern(pattern: Choice) -> Iterator[None]:
    """Inside this context, attention of models set to "heedful" sees only what `pattern` shows too.

    pattern: one for all layers; or a dictionary from layer index to pattern (layers not named, and None,
    keep all that the model sees); or a function from the attention module to a pattern or None.
    Positions count from the first token that the model's cache ever held (left padding included).
    The innermost context counts. Backward passes that recompute the forward must run inside it as well.
    Warns at the end if no attention went through heedful. Raises ValueError if pattern is none of these,
    and in the forward if layers are told apart by index and a module has no `layer_idx`.
    """
    values = list(pattern.values()) if isinstance(pattern, Mapping) else [pattern]
    if not callable(pattern) and not all(isinstance(v, Pattern) or v is None for v in values):
        raise ValueError(
            f"pattern is {pattern!r}, must be a heedful pattern, a dictionary from layer index to pattern, "
            "or a function from the attention module to a pattern"
        )
    chosen = _Chosen(pattern)
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)
    if not chosen.consulted:
        warnings.warn(
            "use_pattern had no effect: no attention ran through heedful; "
            'call model.set_attn_implementation("heedful") first',
            stacklevel=3,
        )


@dataclass
class _Chosen:
    pattern: Choice
    consulted: bool = False

    def of(self, module: nn.Module) -> Pattern | None:
        self.consulted = True
        if isinstance(self.pattern, Pattern):
            return self.pattern
        if not isinstance(self.pattern, Mapping):
            return self.pattern(module)
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"{type(module).__name__} has no layer_idx, so a dictionary of layers cannot be used here; "
                "give use_pattern one pattern, or a function from the module to a pattern"
            )
        return self.pattern.get(layer)


_chosen: ContextVar[_Chosen | None] = ContextVar("heedful pattern", default=None)


@dataclass(frozen=True, eq=False)
class Visible:
    """What a model lets its queries see, as transformers hands it from the mask to the attention function.

    pattern    in positions counted from the first key of the call; None: everything
    key_mask   True = a token, False = padding
    table      for masks known only as a table
    query_offset, key_offset   the position of query 0 counted from key 0, and of key 0 from the first token
    """

    shape: tuple[int, int, int, int]  # like that of a mask, which some models look at
    query_offset: int
    key_offset: int
    pattern: Pattern | None = None
    key_mask: Bool[Tensor, "b m"] | None = None
    table: Bool[Tensor, "b 1 n m"] | None = None
    ndim = 4

    def contiguous(self) -> Visible:  # `generate` asks it of every mask
        return self


@dataclass(frozen=True)
class _Shifted(Pattern):
    """A pattern on positions that are `by` larger than those of the call."""

    inner: Pattern
    by: int

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, q + self.by, k + self.by)

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.tiles(q_lo + self.by, q_hi + self.by, k_lo + self.by, k_hi + self.by)


@dataclass(frozen=True, eq=False)
class _MaskFunction(Pattern):
    """A mask function of transformers, which is elementwise on indices as `visible` is."""

    function: Callable[..., Tensor]
    rows: int

    @property
    def batch(self) -> int:
        return self.rows

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.function(b, h, q, k).to(q.device)


def visible_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking.causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Visible:
    """The mask function of "heedful" (the interface is transformers' AttentionMaskInterface)."""
    if isinstance(attention_mask, Visible):  # `generate` has prepared it
        return attention_mask
    shape = (batch_size, 1, q_length, kv_length)
    offset = int(q_offset) - kv_offset
    if use_vmap:  # such functions need not be elementwise
        table = masking.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            int(q_offset),
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=True,
            device=device,
        )
        return Visible(shape, offset, kv_offset, table=table)
    pattern = _known(mask_function)
    if pattern is None:
        pattern = _shift(_MaskFunction(mask_function, batch_size), kv_offset)
    key_mask = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if key_mask is not None:
        key_mask = key_mask[:, kv_offset : kv_offset + kv_length].bool()
        if key_mask.all():
            key_mask = None
    return Visible(shape, offset, kv_offset, None if isinstance(pattern, Full) else pattern, key_mask)


def attention_forward(
    module: nn.Module,
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    value: Float[Tensor, "b hkv m e"],
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Float[Tensor, " hq"] | None = None,
    softcap: float | None = None,
    cache: Any = None,
    output_attentions: bool | None = False,
    **_: Any,
) -> tuple[Float[Tensor, "b n hq e"], None]:
    """The attention function of "heedful" (the interface is transformers' AttentionInterface).

    Raises ValueError for what it cannot honour: soft-capped logits, a paged cache, weights as an output.
    """
    for name, wanted, instead in (
        ("softcap", softcap is not None, "eager"),
        ("a paged cache", cache is not None, "sdpa"),
        ("output_attentions", output_attentions, "eager"),
    ):
        if wanted:
            raise ValueError(
                f'{type(module).__name__} asks for {name}, which attention implementation "heedful" does not '
                f'give; call model.set_attn_implementation("{instead}")'
            )
    told = visibility(module, query, key, attention_mask, is_causal, position_bias, scaling, value)
    out = attention(query, key, value, **told, scale=scaling, sink_logits=s_aux, dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


# A cache that is asked about the keys it has given puts a function here, under the tensor that its `update`
# returns. It is called once, with (query, key, value, scale, visibility), when attention over these keys is
# about to be computed: it may score its entries, and gives back who sees whom, because only it knows which
# tokens it still has.
Keeper = Callable[[Tensor, Tensor, Tensor, float, Visibility], Visibility]
keepers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def visibility(
    module: nn.Module,
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    attention_mask: Visible | Tensor | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    scaling: float | None,
    value: Float[Tensor, "b hkv m e"],
) -> Visibility:
    """What the model, the cache and `use_pattern` (where it is in force) let the queries of a call see."""
    n, m = query.shape[2], key.shape[2]
    keeper = keepers.pop(key, None)
    pattern: Pattern | None = None
    key_mask, bias, offset, first = None, position_bias, m - n, 0
    if isinstance(attention_mask, Visible):
        pattern, first = attention_mask.pattern, attention_mask.key_offset
        if attention_mask.shape[3] == m:
            offset = attention_mask.query_offset
        elif keeper is None or not (
            pattern is None or pattern.relative
        ):  # else the last keys are the new tokens
            raise ValueError(
                f"the mask is for {attention_mask.shape[3]} keys, must be for the {m} of the call"
            )
        if attention_mask.key_mask is not None:
            key_mask = attention_mask.key_mask.to(query.device)
        if attention_mask.table is not None:
            bias = _add_mask(bias, attention_mask.table, query)
    elif attention_mask is not None:
        bias = _add_mask(bias, attention_mask, query)
    elif n > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        # Without a mask, transformers aligns causal queries with the first keys; the others are unused.
        pattern, offset = Causal(), 0

    chosen = _chosen.get()
    if chosen is not None and (narrow := chosen.of(module)) is not None:
        narrow = _shift(narrow, first)
        pattern = narrow if pattern is None else pattern & narrow
    told = Visibility(pattern=pattern, bias=bias, key_mask=key_mask, query_offset=offset)
    if keeper is None:
        return told
    return keeper(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, told)


def _shift(pattern: Pattern, by: int) -> Pattern:
    return pattern if by == 0 or pattern.relative else _Shifted(pattern, by)


def _add_mask(bias: Tensor | None, mask: Tensor, query: Tensor) -> Tensor:
    """Join a mask (bool, True = visible, or added to the logits) with a bias."""
    if mask.ndim != 4:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, must be (batch, heads, n, m)")
    mask = mask.to(query.device)
    if mask.dtype == torch.bool:
        mask = query.new_zeros(()).masked_fill(~mask, -torch.inf)
    return mask if bias is None else bias + mask


# Mask functions are closures; two of one factory share their code object.
_AND = masking.and_masks(masking.causal_mask_function).__code__
_BACK = masking.sliding_window_overlay(1).__code__
_AROUND = masking.sliding_window_bidirectional_overlay(1).__code__


def _known(function: Callable) -> Pattern | None:
    """The pattern of a mask function, where it is one of the regular ones of transformers."""
    if function is masking.causal_mask_function:
        return Causal()
    if function is masking.bidirectional_mask_function:
        return Full()
    if getattr(function, "__code__", None) is _AND:
        parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
        if len(parts) == 2:
            window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
            code = getattr(parts[0], "__code__", None)
            if code is _BACK and window is not None and parts[1] is masking.causal_mask_function:
                return Window(window - 1, 0)
            if code is _AROUND and window is not None and parts[1] is masking.bidirectional_mask_function:
                return Window(window)
    return None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, visible_mask)
