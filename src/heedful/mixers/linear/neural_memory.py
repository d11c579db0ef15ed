"""Neural memory of Titans: a small network that learns the sequence while it reads it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.delta import l2_normalize
from heedful.ops.neural_memory import MemoryState, initial_memory, neural_memory_update, read_memory
from heedful.ops.short_conv import short_conv
from heedful.registry import register


@dataclass(frozen=True)
class NeuralMemoryState(State):
    """Weights of the memory (before the current chunk, and now), their momentum, the convolutions' past."""

    reference: Float[Tensor, "b h p"] | None = None
    weights: Float[Tensor, "b h p"] | None = None
    momentum: Float[Tensor, "b h p"] | None = None
    query_past: Float[Tensor, "b past c"] | None = None
    key_past: Float[Tensor, "b past c"] | None = None
    value_past: Float[Tensor, "b past c"] | None = None


@register(
    "neural-memory",
    kind="sequence",
    paper="titans",
    tags=("linear", "memory", "gate"),
    aliases=("titans-lmm",),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class NeuralMemory(Mixer):
    """A perceptron M whose weights are the state: each token is one step of gradient descent with momentum.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v)),  q and k of length 1,  in heads
        step, momentum, alpha = sigmoid(x w + b), one of each a head and token
        S_t = momentum_t S_(t-1) - step_t grad |M(k_t) - v_t|^2,  W_t = (1 - alpha_t) W_(t-1) + S_t
        o_t = M(q_t; W_t),  y = concat_h(w o / sqrt(mean(o^2) + eps) silu(x W_g)) W_o

    Gradients are taken at the weights before the chunk of the token. M is silu between linear layers without
    bias; the weights it starts from are learned. conv is causal and depthwise.

    dim            channels
    heads          memories side by side, a divisor of dim
    memory_layers  layers of M; 1 is a matrix, and the rule a delta rule with momentum
    expansion      width of M's hidden layers, in head widths
    chunk_size     tokens whose gradients are taken at the same weights; 1 is the exact recurrence
    conv_size      taps of the convolutions
    eps            in the norm of the outputs

    The paper leaves open M's activation, its widths, the gate's and how biases start: the last so that steps
    are about 0.01, momentum 0.5 and alpha 0.02. A step too great for the chunk makes the descent diverge.
    Padding: a masked token enters the convolutions as zeros and changes neither W nor S, but counts in its
    chunk. `positions` have no effect.
    State: three sets of M's weights for every head, and the past of the convolutions.
    Raises ValueError if heads does not divide dim, on wrong shapes, or if a context is given.
    Source: Titans, arXiv 2501.00663 (the memory alone, LMM).
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2, "expansion": 2, "chunk_size": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        memory_layers: int = 2,
        expansion: int = 4,
        chunk_size: int = 16,
        conv_size: int = 4,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        for name, number in (
            ("memory_layers", memory_layers),
            ("expansion", expansion),
            ("chunk_size", chunk_size),
            ("conv_size", conv_size),
        ):
            check_positive(name, number)
        self.heads, self.chunk_size = heads, chunk_size
        width = dim // heads
        self.widths = [width, *[expansion * width] * (memory_layers - 1), width]

        def linear(out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(dim, out, bias=bias, device=device, dtype=dtype)

        def taps() -> nn.Conv1d:
            return nn.Conv1d(dim, dim, conv_size, groups=dim, bias=False, device=device, dtype=dtype)

        self.query, self.key, self.value, self.gate = (linear(dim) for _ in range(4))
        self.query_conv, self.key_conv, self.value_conv = (taps() for _ in range(3))
        self.step, self.momentum, self.forget = (linear(heads, bias=True) for _ in range(3))
        self.memory = nn.ParameterList(
            torch.empty(heads, i, o, device=device, dtype=dtype).normal_(std=i**-0.5)
            for i, o in itertools.pairwise(self.widths)
        )
        self.norm = nn.RMSNorm(width, eps=eps, device=device, dtype=dtype)
        self.out = linear(dim)
        for layer, start in ((self.step, -4.5), (self.momentum, 0.0), (self.forget, -4.0)):
            nn.init.constant_(layer.bias, start)

    def init_state(self, batch: int) -> NeuralMemoryState:
        """The state before the first token of `batch` sequences."""
        return NeuralMemoryState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: NeuralMemoryState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], NeuralMemoryState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        before = NeuralMemoryState() if state is None else state

        query, query_past = self._taps(self.query(x), self.query_conv, before.query_past)
        key, key_past = self._taps(self.key(x), self.key_conv, before.key_past)
        value, value_past = self._taps(self.value(x), self.value_conv, before.value_past)
        wide = torch.promote_types(x.dtype, torch.float32)
        step, momentum, forget = (
            layer(x).mT.contiguous().to(wide) for layer in (self.step, self.momentum, self.forget)
        )
        step, log_momentum, log_keep = step.sigmoid(), F.logsigmoid(momentum), F.logsigmoid(-forget)
        write = torch.ones_like(step)
        if mask is not None:
            step, log_momentum, log_keep, write = (
                t.masked_fill(~mask[:, None], 0.0) for t in (step, log_momentum, log_keep, write)
            )
        o, memory = neural_memory_update(
            l2_normalize(query),
            l2_normalize(key),
            value,
            step,
            log_momentum,
            log_keep,
            widths=self.widths,
            state=self._memory(before, x.shape[0]),
            write=write,
            chunk_size=self.chunk_size,
            return_state=True,
        )

        y = self._give(o, x)
        if state is None:
            return y
        return y, NeuralMemoryState(
            state.length + x.shape[1],
            memory.reference,
            memory.weights,
            memory.momentum,
            query_past,
            key_past,
            value_past,
        )

    def read(
        self, x: Float[Tensor, "b n c"], state: NeuralMemoryState, *, past: Tensor | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b past c"]]:
        """What the memory of a state gives for x without learning it.

        past: of the convolution of queries, zeros if None. Gives y, and the past of the tokens that follow.
        """
        query, past = self._taps(self.query(x), self.query_conv, past)
        weights = self._memory(state, x.shape[0]).weights
        return self._give(read_memory(l2_normalize(query), weights, widths=self.widths), x), past

    def _give(self, o: Float[Tensor, "b h n d"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """What was read, normalised and gated by the tokens that asked."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gate = F.silu(self.gate(x))
        o = F.rms_norm(
            o.transpose(1, 2).to(wide), self.norm.normalized_shape, self.norm.weight.to(wide), self.norm.eps
        )
        return self.out(o.flatten(2).to(gate.dtype) * gate)

    def _taps(
        self, x: Float[Tensor, "b n c"], conv: nn.Conv1d, past: Tensor | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b past c"]]:
        y, past = short_conv(x, conv.weight, past)
        return rearrange(F.silu(y), "b n (h d) -> b h n d", h=self.heads), past

    def _memory(self, state: NeuralMemoryState, batch: int) -> MemoryState:
        if state.weights is None:
            return initial_memory(list(self.memory), batch)
        assert state.reference is not None
        assert state.momentum is not None
        inside = state.length % self.chunk_size
        return MemoryState(inside, state.reference, state.weights, state.momentum)
