"""Neural memory of the unofficial titans-pytorch: other losses, norms, chunks and reads than the paper."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heedful.checks import (
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.registry import register

EPS = 1e-5  # in the memory's own norm
CHUNKS = 64  # chunks whose weights are held at a time; in backward, all others are computed again


@dataclass(frozen=True)
class TitansPytorchState(State):
    """Weights (where gradients are taken, and now), momentum, and normed tokens not yet written."""

    reference: Float[Tensor, "b h p"] | None = None
    weights: Float[Tensor, "b h p"] | None = None
    momentum: Float[Tensor, "b h p"] | None = None
    pending: Float[Tensor, "b r c"] | None = None
    pending_mask: Bool[Tensor, "b r"] | None = None


@register(
    "titans-pytorch-memory",
    kind="sequence",
    paper="titans",
    tags=("linear", "memory"),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class TitansPytorchMemory(Mixer):
    """The neural memory of the unofficial lucidrains/titans-pytorch; `neural-memory` is that of the paper.

        s = norm_s(x);  k, v = s W_k, s W_v in heads;  lr = max_lr sigmoid(s w + b), one a head and token
        eta, alpha = sigmoid(mean of s over a chunk, w + b), one of each a head and chunk
        M(z) = (gamma + 1) LN(gelu(... gelu(z W_1) ...) W_L) + z
        g = the gradient of sum over the chunk of lr mean((M(k) - v)^2), at the reference weights
        S = eta S - g,  W = (1 - alpha) W + S, once a chunk
        y_t = M(norm_r(x_t) W_q), with the weights after the (t + 1) // chunk_size first chunks

    norm_s, norm_r are root mean square norms with the smallest eps of the dtype. With several heads, y is
    multiplied by sigmoid(norm_r(x) W_g), one gate a head, and mapped to dim by a last projection.

    dim         channels
    heads       memories side by side
    head_dim    channels of a memory; None: dim. Must be dim with one head
    chunk_size  tokens of one write
    batch_size  the reference weights become the present ones every so many tokens, a multiple of chunk_size;
                None: gradients are always taken at the first weights
    depth       layers of M
    expansion   width of M's hidden layers, in head_dim
    max_lr      bound of lr

    Padding: a masked token has lr 0 and no part in the means; it counts in its chunk. `positions` have no
    effect. State: three sets of M's weights for every head, and fewer tokens than a chunk.
    Raises ValueError if head_dim or batch_size do not fit, on wrong shapes, or if a context is given.
    Source: lucidrains/titans-pytorch, after Titans, arXiv 2501.00663.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 2,
        "head_dim": 6,
        "chunk_size": 3,
        "expansion": 2.0,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        chunk_size: int = 1,
        batch_size: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        max_lr: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        head_dim = dim if head_dim is None else head_dim
        for name, number in (
            ("heads", heads),
            ("head_dim", head_dim),
            ("chunk_size", chunk_size),
            ("depth", depth),
        ):
            check_positive(name, number)
        if heads == 1 and head_dim != dim:
            raise ValueError(f"head_dim is {head_dim}, must be {dim} (dim) with one head")
        if batch_size is not None and (batch_size < 1 or batch_size % chunk_size):
            raise ValueError(f"batch_size is {batch_size}, must be a multiple of chunk_size, {chunk_size}")
        self.heads, self.chunk_size, self.batch_size, self.max_lr = heads, chunk_size, batch_size, max_lr
        self.widths = [head_dim, *[int(expansion * head_dim)] * (depth - 1), head_dim]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.store_norm = nn.RMSNorm(dim, **factory)
        self.retrieve_norm = nn.RMSNorm(dim, **factory)
        self.query = nn.Linear(dim, heads * head_dim, bias=False, **factory)
        self.key = nn.Linear(dim, heads * head_dim, bias=False, **factory)
        self.value = nn.Linear(dim, heads * head_dim, bias=False, **factory)
        self.step = nn.Linear(dim, heads, **factory)
        self.momentum = nn.Linear(dim, heads, **factory)
        self.forget = nn.Linear(dim, heads, **factory)
        self.gamma = nn.Parameter(torch.zeros(heads, head_dim, **factory))
        self.memory = nn.ParameterList(
            torch.empty(heads, i, o, **factory).uniform_(-1.0, 1.0) * math.sqrt(6 / (i + o))
            for i, o in itertools.pairwise(self.widths)
        )
        self.gate = nn.Linear(dim, heads, bias=False, **factory) if heads > 1 else None
        self.out = nn.Linear(heads * head_dim, dim, bias=False, **factory) if heads > 1 else None

    def init_state(self, batch: int) -> TitansPytorchState:
        """The state before the first token of `batch` sequences."""
        return TitansPytorchState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: TitansPytorchState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], TitansPytorchState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        now = self._start(x) if state is None or state.weights is None else state

        # Few chunks at a time, because each of them has weights of its own.
        outs = []
        size = CHUNKS * self.chunk_size
        again = x.shape[1] > size and torch.is_grad_enabled()
        for piece, shown in zip(x.split(size, dim=1), seen.split(size, dim=1), strict=True):
            if again:
                y, now = checkpoint(
                    self._piece, piece, shown, now, use_reentrant=False, preserve_rng_state=False
                )
            else:
                y, now = self._piece(piece, shown, now)
            outs.append(y)
        y = torch.cat(outs, dim=1)
        return y if state is None else (y, now)

    def _piece(
        self, x: Tensor, seen: Tensor, before: TitansPytorchState
    ) -> tuple[Tensor, TitansPytorchState]:
        assert before.pending is not None
        assert before.pending_mask is not None
        stored = torch.cat([before.pending, self.store_norm(x)], dim=1)
        seen = torch.cat([before.pending_mask, seen], dim=1)
        history, after = self._write(stored, seen, before, before.length + x.shape[1])
        return self._read(self.retrieve_norm(x), history, before.pending.shape[1]), after

    def _start(self, x: Tensor) -> TitansPytorchState:
        wide = torch.promote_types(self.gamma.dtype, torch.float32)
        flat = torch.cat([self.gamma, *(w.flatten(1) for w in self.memory)], dim=-1).to(wide)
        flat = flat.expand(x.shape[0], -1, -1)
        seen = x.new_ones(x.shape[0], 0, dtype=torch.bool)
        return TitansPytorchState(0, flat, flat, torch.zeros_like(flat), x[:, :0], seen)

    def _write(
        self, stored: Tensor, seen: Tensor, before: TitansPytorchState, length: int
    ) -> tuple[Tensor, TitansPytorchState]:
        """Write the whole chunks of the stored tokens: the weights before and after each, and the state."""
        reference, weights, momentum = before.reference, before.weights, before.momentum
        assert reference is not None
        assert weights is not None
        assert momentum is not None
        chunks = stored.shape[1] // self.chunk_size
        whole = chunks * self.chunk_size
        written = length - stored.shape[1]  # tokens written before, whole chunks
        history = [weights]
        if chunks:
            tokens, shown = (
                t[:, :whole].unflatten(1, (chunks, self.chunk_size)) for t in (stored, seen[..., None])
            )
            key, value = (
                rearrange(y, "b t s (h d) -> b h t s d", h=self.heads)
                for y in (self.key(tokens), self.value(tokens))
            )
            # 1. Rates: of tokens, and of chunks.
            rate = self.max_lr * self.step(tokens).sigmoid().masked_fill(~shown, 0.0)
            rate = rearrange(rate, "b t s h -> b h t s 1")
            mean = tokens.masked_fill(~shown, 0.0).sum(2) / shown.sum(2).clamp_min(1)
            eta, alpha = (
                rearrange(layer(mean).to(weights.dtype).sigmoid(), "b t h -> t b h 1")
                for layer in (self.momentum, self.forget)
            )
            # 2. Surprise, for the chunks that share their reference; then momentum and decay, chunk by chunk.
            start = 0
            while start < chunks:
                stop = chunks
                if self.batch_size is not None:
                    done = written // self.chunk_size + start
                    period = self.batch_size // self.chunk_size
                    stop = min(chunks, start + period - done % period)
                    reference = weights if done % period == 0 else reference
                gradient = self._gradient(
                    key[:, :, start:stop], value[:, :, start:stop], rate[:, :, start:stop], reference
                )
                for t in range(start, stop):
                    momentum = eta[t] * momentum - gradient[:, :, t - start]
                    weights = (1 - alpha[t]) * weights + momentum
                    history.append(weights)
                start = stop
        after = TitansPytorchState(length, reference, weights, momentum, stored[:, whole:], seen[:, whole:])
        return torch.stack(history, dim=2), after

    def _read(self, x: Tensor, history: Tensor, pending: int) -> Tensor:
        """Tokens with the weights after the chunks that are whole by then, a token's own included."""
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        # With pending + 1 tokens before it, token i falls into the group of its chunk count.
        groups = history.shape[2]
        behind = groups * self.chunk_size - pending - 1 - x.shape[1]
        padded = F.pad(query, (0, 0, pending + 1, behind)).unflatten(2, (groups, self.chunk_size))
        with torch.autocast(x.device.type, enabled=False):
            y = self._network(padded.to(history.dtype), history)[-1]
        y = y.flatten(2, 3)[:, :, pending + 1 : pending + 1 + x.shape[1]].to(query.dtype)
        if self.gate is None or self.out is None:
            return y[:, 0]
        y = rearrange(y, "b h n d -> b n h d") * self.gate(x).sigmoid()[..., None]
        return self.out(y.flatten(2))

    def _parts(self, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
        shapes = list(itertools.pairwise(self.widths))
        gamma, *layers = flat.split([self.widths[0], *(i * o for i, o in shapes)], dim=-1)
        return gamma[..., None, :], [w.unflatten(-1, shape) for w, shape in zip(layers, shapes, strict=True)]

    def _network(self, z: Tensor, flat: Tensor) -> list[Tensor]:
        """What each layer takes in and gives before its gelu: z, a_1, .., a_L; and M(z)."""
        gamma, layers = self._parts(flat)
        kept, inner = [z], z
        for layer in layers:
            kept.append((inner if len(kept) == 1 else F.gelu(inner)) @ layer)
            inner = kept[-1]
        return [*kept, (gamma + 1) * F.layer_norm(inner, inner.shape[-1:], eps=EPS) + z]

    def _gradient(self, key: Tensor, value: Tensor, rate: Tensor, flat: Tensor) -> Tensor:
        """Gradients of the chunks' losses with respect to all weights, (b, h, t, p)."""
        with torch.autocast(key.device.type, enabled=False):
            key, value, rate = (t.to(flat.dtype) for t in (key, value, rate))
            flat = flat.unsqueeze(2)
            gamma, layers = self._parts(flat)
            *kept, out = self._network(key, flat)
            error = rate * 2 * (out - value) / value.shape[-1]
            # Through the norm: what is parallel to a constant or to the normed numbers has no effect.
            last = kept[-1]
            centred = last - last.mean(-1, keepdim=True)
            spread = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
            normed = centred * spread
            found = [(error * normed).sum(-2)]
            error = error * (gamma + 1)
            parallel = normed * (error * normed).mean(-1, keepdim=True)
            error = (error - error.mean(-1, keepdim=True) - parallel) * spread
            # Through the layers, last to first.
            for number in reversed(range(len(layers))):
                taken = kept[number] if number == 0 else F.gelu(kept[number])
                found.insert(1, (taken.mT @ error).flatten(-2))
                if number:
                    z = kept[number]
                    slope = torch.special.ndtr(z) + z * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
                    error = (error @ layers[number].mT) * slope
            return torch.cat(found, dim=-1)
