"""p-adapter: a bottleneck beside the output of attention, fed by messages along its attention weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_mask, check_positions, check_positive, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.p_laplacian import p_laplacian
from heedful.patterns.causal import Causal
from heedful.registry import register


@dataclass(frozen=True)
class PAdapterState(KVState):
    """Keys, values and nodes of all tokens seen."""

    nodes: Float[Tensor, "b h m r"] | None = None


class PLaplacianAdapter(nn.Module):
    """A gated bottleneck on one step of p-Laplacian message passing.

        F = p_laplacian(A, N_q, N_k; p, mu0 (2 + tanh theta)),   x + W_o (gelu(W_g x) * concat_h F)

    dim        channels of x
    heads      heads of the attention weights A
    reduction  dim / reduction channels in the bottleneck
    p          of the Laplacian, positive; learnable_p: the start of a parameter
    mu         mu0; mu lies between mu0 and 3 mu0
    Source: p-Laplacian adaptation, arXiv 2312.10613.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        reduction: int = 8,
        p: float = 1.75,
        learnable_p: bool = True,
        mu: float = 0.1,
        zero_diagonal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("reduction", reduction, "dim", dim)
        check_divides("heads", heads, "dim / reduction", dim // reduction)
        for name, number in (("p", p), ("mu", mu)):
            if not number > 0:
                raise ValueError(f"{name} is {number}, must be greater than 0")
        self.heads, self.mu, self.zero_diagonal = heads, mu, zero_diagonal
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(dim, dim // reduction, **factory)
        self.gate = nn.Linear(dim, dim // reduction, **factory)
        self.up = nn.Linear(dim // reduction, dim, **factory)
        self.p = nn.Parameter(torch.full((1,), float(p), **factory)) if learnable_p else float(p)
        self.theta = nn.Parameter(torch.zeros(1, **factory))

    def nodes(self, z: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n r"]:
        """Nodes of the graph from projections that passed the output matrix of the attention."""
        return rearrange(self.down(z), "b n (h r) -> b h n r", h=self.heads)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        weights: Float[Tensor, "b h n m"],
        query_nodes: Float[Tensor, "b h n r"],
        key_nodes: Float[Tensor, "b h m r"],
        *,
        own: bool,
    ) -> Float[Tensor, "b n c"]:
        mu = self.mu * (2 + self.theta.tanh())
        messages = p_laplacian(
            weights, query_nodes, key_nodes, p=self.p, mu=mu, own=own, zero_diagonal=self.zero_diagonal
        )
        return x + self.up(F.gelu(self.gate(x)) * rearrange(messages, "b h n r -> b n (h r)"))


class FFNAdapter(nn.Module):
    """The bottleneck beside a feed-forward net: r + W_2 relu(W_1 r), which takes the residual's place.

    dim        channels; reduction: dim / reduction of them in the bottleneck
    In a post-norm layer: LN(FFN(r) + adapter(r)). Source: p-Laplacian adaptation, arXiv 2312.10613.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("reduction", reduction, "dim", dim)
        self.down = nn.Linear(dim, dim // reduction, device=device, dtype=dtype)
        self.up = nn.Linear(dim // reduction, dim, device=device, dtype=dtype)

    def forward(self, r: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return r + self.up(F.relu(self.down(r)))


class AdaptedOutput(nn.Module):
    """What follows the heads in a post-norm block: W_out, the adapter, the residual, a layer norm."""

    def __init__(self, dim: int, *, norm_eps: float = 1e-12, dropout: float = 0.1, **adapter: Any) -> None:
        super().__init__()
        factory: dict[str, Any] = {name: adapter.get(name) for name in ("device", "dtype")}
        self.dense = nn.Linear(dim, dim, **factory)
        self.dropout = nn.Dropout(dropout)
        self.adapter = PLaplacianAdapter(dim, **adapter)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **factory)

    def nodes(self, projected: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n r"]:
        """Nodes of the graph from queries or values with their heads side by side."""
        return self.adapter.nodes(self.dense(projected))

    def forward(
        self,
        attended: Float[Tensor, "b n c"],
        residual: Float[Tensor, "b n c"],
        weights: Float[Tensor, "b h n m"] | None = None,
        query_nodes: Float[Tensor, "b h n r"] | None = None,
        key_nodes: Float[Tensor, "b h m r"] | None = None,
        *,
        own: bool = True,
    ) -> Float[Tensor, "b n c"]:
        """Without weights and nodes: the block as it was before it had an adapter."""
        y = self.dropout(self.dense(attended))
        if weights is not None:
            y = self.adapter(y, weights, query_nodes, key_nodes, own=own)
        return self.norm(y + residual)


@register(
    "p-adapter",
    kind="sequence",
    paper="p-adapter",
    tags=("heads", "softmax", "adapter", "graph"),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N^2 C)",
)
class PAdapterAttention(Mixer):
    """A post-norm attention block with a p-Laplacian adapter.

        A_h = softmax(q_h k_h^T / sqrt(d)),  z = W_out concat_h(A_h v_h),  y = LN(x + adapter(z; A, nodes))

    nodes: W_i W_out v of the tokens of x. With a context, W_i W_out q on the one side, and on the other
    those of the values, which like A are first averaged over the context to `samples` places.

    dim            channels of x, of the context and of y
    heads          heads, a divisor of dim / reduction
    reduction      dim / reduction channels in the bottleneck of the adapter
    p              of the Laplacian, positive: p = 2 keeps A as it is; learnable_p: the start of a parameter
    mu             mu0; the learned mu lies between mu0 and 3 mu0
    samples        places that a context is averaged to
    zero_diagonal  a token sends no message to itself; ours, see `heedful.ops.p_laplacian`
    causal         a token sees itself and what came before; needed to decode
    norm_eps       of the layer norm
    dropout        share of the attention weights, and of what leaves W_out, dropped in training

    To train the adapter alone, freeze all but `output.adapter`. forward: mask (b, n) hides tokens of x as
    keys, context_mask (b, m) those of the context, whose values then count as zeros; `positions` have no
    effect, and neither has `causal` with a context. Holds n m dim / reduction numbers. State: 2 dim +
    dim / reduction numbers a token.
    Raises ValueError if heads or reduction do not divide, on wrong shapes, and for a state with a context.
    Source: p-Laplacian adaptation, arXiv 2312.10613.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "reduction": 2, "samples": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        reduction: int = 8,
        p: float = 1.75,
        learnable_p: bool = True,
        mu: float = 0.1,
        samples: int = 24,
        zero_diagonal: bool = False,
        causal: bool = False,
        norm_eps: float = 1e-12,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("samples", samples)
        self.heads, self.reduction, self.samples, self.causal = heads, reduction, samples, causal
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, dim, **factory)
        self.key = nn.Linear(dim, dim, **factory)
        self.value = nn.Linear(dim, dim, **factory)
        self.dropout = nn.Dropout(dropout)
        self.output = AdaptedOutput(
            dim,
            norm_eps=norm_eps,
            dropout=dropout,
            heads=heads,
            reduction=reduction,
            p=p,
            learnable_p=learnable_p,
            mu=mu,
            zero_diagonal=zero_diagonal,
            **factory,
        )

    def init_state(self, batch: int) -> PAdapterState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return PAdapterState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: PAdapterState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], PAdapterState]:
        self._door(x, context, mask, context_mask, positions, state)
        source, seen = (x, mask) if context is None else (context, context_mask)
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        nodes = None
        if state is not None:
            nodes = self.output.nodes(_joined(v))
            if state.nodes is not None:
                nodes = torch.cat([state.nodes, nodes], dim=2)
            kept = state.append(k, v, mask)
            assert kept.key is not None
            assert kept.value is not None
            k, v, seen = kept.key, kept.value, kept.mask
            state = PAdapterState(kept.length, k, v, seen, nodes)
        visible = None if seen is None else seen[:, None, None]
        if self.causal and context is None:
            before = Causal().mask(q.shape[2], k.shape[2], device=x.device)
            visible = before if visible is None else before & visible
        y = self.attend(x, q, k, v, visible, own=context is None, nodes=nodes)
        return y if state is None else (y, state)

    def attend(
        self,
        x: Float[Tensor, "b n c"],
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h m d"],
        value: Float[Tensor, "b h m d"],
        visible: Bool[Tensor, "#b #h #n m"] | None = None,
        *,
        own: bool,
        nodes: Float[Tensor, "b h m r"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The block from its heads on; x is the residual.

        own    the queries are the last of the keys, and the graph is theirs; else the keys are a context
        nodes  with `own`, those of the values, where they are known
        """
        weights = _probabilities(query, key, visible)
        attended = _joined(self.dropout(weights).to(value.dtype) @ value)
        # The graph: tokens with themselves, or tokens on one side and places of the context on the other.
        if own:
            key_nodes = self.output.nodes(_joined(value)) if nodes is None else nodes
            query_nodes = key_nodes[:, :, key_nodes.shape[2] - query.shape[2] :]
        else:
            if visible is not None:
                value = value.masked_fill(~visible[:, :, -1, :, None], 0.0)
            query_nodes = self.output.nodes(_joined(query))
            key_nodes = self.output.nodes(self._pooled(_joined(value).mT).mT)
            weights = self._pooled(weights.flatten(1, 2)).unflatten(1, query.shape[1:3])
        return self.output(attended, x, weights, query_nodes, key_nodes, own=own)

    def _pooled(self, x: Float[Tensor, "b r m"]) -> Float[Tensor, "b r places"]:
        """Means over `samples` stretches of the last axis; nothing of nothing."""
        return F.adaptive_avg_pool1d(x, self.samples) if x.shape[-1] and x.shape[0] and x.shape[1] else x

    def _door(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        positions: Tensor | None,
        state: PAdapterState | None,
    ) -> None:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given, must come with a context")
            return
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
        if state is not None:
            raise ValueError("state is given, must be None with a context: a state is of self-attention")


def _joined(heads: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
    return rearrange(heads, "b h n d -> b n (h d)")


def _probabilities(query: Tensor, key: Tensor, visible: Tensor | None) -> Float[Tensor, "b h n m"]:
    """The attention weights, which the adapter needs as a table; rows that see nothing are zeros."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
    if visible is None:
        return logits.softmax(-1)
    lowest = torch.finfo(logits.dtype).min  # autocast may have made it a half
    return logits.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0.0)
