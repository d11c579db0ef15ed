"""Dynamic hierarchical sparse attention: predicted chunks, and a budget of keys for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.packed import PackedState, Packing
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.registry import register
from heedful.routing.boundary_predictor import (
    BoundaryPredictor,
    attention_ratios,
    boundary_loss,
    chunk_ends,
    peak_boundaries,
    published_boundaries,
)
from heedful.routing.chunk_topk import best_tokens, chunk_scores, chunk_topk, key_groups, with_ends

SELECTIONS = ("strict", "paper")


@dataclass(frozen=True)
class DHSAState(PackedState):
    """Also the last mean queries (b, 1, t, d), from place `base` on, and boundary logits (b, 1, m, 1)."""

    base: int = 0
    recent: Float[Tensor, "b 1 t d"] | None = None
    logits: Float[Tensor, "b 1 m 1"] | None = None


@register(
    "dhsa",
    kind="sequence",
    paper="dhsa",
    tags=("sparse", "softmax", "chunks"),
    causal="always",
    decode=True,
    complexity="O(N K C + N^2 / (B S) C), K keys a query, blocks of B queries, chunks of S tokens",
)
class DynamicHierarchicalSparseAttention(Mixer):
    """Causal attention of each block of queries to a budget of keys, taken from the chunks it likes best.

        score(block, chunk) = query of the block . mean key of the chunk * sqrt(length of the chunk)
        y_t = W_o softmax(q_t k_j / sqrt(d)) v_j over j <= t among the budget's keys of t's block

    The budget holds the last `local_tokens` keys up to the end of the block, the first `global_tokens`, and
    tokens of the best chunks before; all heads and blocks of `block_size` queries share theirs. Chunks end
    where a small network over the keys sees the text turn, or all have `chunk_size` tokens.

    Strict form (default): a block is scored by the mean of the `block_size` queries up to its own first; a
    chunk counts from the token on by which its end is certain, and what follows the last such end is one
    chunk of its own. Boundaries are gaps above `threshold` that are the largest within `nms_window` gaps.
    selection="paper": as published, with the mean of the block itself and boundaries chosen over the whole
    sequence, whose last `instruction_tokens` queries see everything; these look ahead, so that it is not
    causal. With a state the first call is the prompt; later ones attend to all keys.

    dim             channels
    heads           query heads;  kv_heads: key and value heads, a divisor; None: as many
    block_size      queries that share their keys
    budget          keys a block sees, at most; those of the block itself are always among them
    local_tokens, global_tokens     keys always in the budget; local_tokens is raised to block_size in the
                                    strict form
    chunk_size      None: predicted chunks; else all chunks have this many tokens, and there is no predictor
    boundary_window, threshold, nms_window, chunk_beta   of the predictor and of the choice among gaps;
                    chunk_beta (selection="paper"): at most chunk_beta boundaries a block
    boundary_loss   in training aux_losses["boundary"] trains the predictor on the layer's own dense
                    attention, which takes O(N^2) time; no other gradient reaches it
    qkv_bias        biases in the projections of queries, keys and values
    dropout         share of the attention weights dropped in training

    Queries and keys carry a rotary embedding. The choice passes no gradient. Blocks count real tokens:
    masked ones are left out, and get the output of no context; selection="paper" takes no mask, as the
    authors' code.
    Raises ValueError if heads does not divide dim into even widths, kv_heads not heads, and
    for a context.
    Source: DHSA, arXiv 2510.24606.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "block_size": 3,
        "budget": 9,
        "local_tokens": 4,
        "global_tokens": 1,
        "boundary_window": 2,
        "nms_window": 1,
        "threshold": 0.0,
        "boundary_loss": True,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        block_size: int = 64,
        budget: int = 1024,
        local_tokens: int = 128,
        global_tokens: int = 128,
        instruction_tokens: int = 64,
        chunk_size: int | None = None,
        boundary_window: int = 4,
        threshold: float = 1.1,
        nms_window: int = 8,
        chunk_beta: int = 8,
        boundary_loss: bool = False,
        selection: str = "strict",
        qkv_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_divides("heads", heads, "dim", dim)
        check_divides("kv_heads", kv_heads, "heads", heads)
        check_choice("selection", selection, SELECTIONS)
        for name, value in (("block_size", block_size), ("budget", budget), ("nms_window", nms_window)):
            check_positive(name, value)
        if dim // heads % 2:
            raise ValueError(f"dim / heads is {dim // heads}, must be even for the rotary embedding")
        if boundary_loss and chunk_size is not None:
            raise ValueError("boundary_loss is True, must be False with a chunk_size: there is no predictor")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.block_size, self.selection, self.causal = block_size, selection, selection == "strict"
        self.local_tokens = max(local_tokens, block_size) if self.causal else local_tokens
        self.budget = max(budget, block_size)
        self.global_tokens, self.instruction_tokens = global_tokens, instruction_tokens
        self.chunk_size, self.boundary_loss = chunk_size, boundary_loss
        self.threshold, self.nms_window, self.chunk_beta = threshold, nms_window, chunk_beta
        self.dropout = dropout
        width = kv_heads * self.head_dim
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.predictor: BoundaryPredictor | None = None
        if chunk_size is None:
            self.predictor = BoundaryPredictor(
                width, heads=kv_heads, window=boundary_window, device=device, dtype=dtype
            )
            self.predictor.requires_grad_(boundary_loss)
        else:
            check_positive("chunk_size", chunk_size)

    def init_state(self, batch: int) -> DHSAState:
        """The state before the first token; it keeps all keys and values."""
        return DHSAState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: DHSAState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], DHSAState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if mask is not None and self.selection == "paper":
            raise ValueError("mask is given, must be None with selection='paper'")
        past = DHSAState() if state is None else state
        if positions is None:
            positions = torch.arange(past.length, past.length + x.shape[1], device=x.device)
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        angles = rotary_angles(positions, self.head_dim, dtype=x.dtype)
        held = 0 if past.key is None else past.key.shape[2]
        packing = Packing.of(x[..., 0], mask, past.length, past.count, held)
        query = packing.put(rotate(query, angles))
        key = packing.extend(past.key, packing.put(rotate(key, angles)))
        value = packing.extend(past.value, packing.put(value))
        # 1. Boundary logits of the gaps that new tokens tell of.
        logits = self._logits(key, past, packing)
        self.aux_losses = {}
        if self.training and self.boundary_loss and not past.length and x.numel():
            self.aux_losses["boundary"] = self._loss(query, key, logits, packing)
        # 2 to 8. Choice of keys, and attention to them.
        recent = packing.extend(past.recent, query.detach().mean(1, keepdim=True), past.base)
        if self.selection == "strict":
            heads = self._strict(query, key, value, logits, recent, past.base, packing)
        elif past.length:
            heads = self._attend(query, key, value, Causal(), packing.start)
        else:
            heads = self._paper(query, key, value, logits)
        y = self.out(rearrange(packing.take(heads), "b h n d -> b n (h d)"))
        if state is None:
            return y
        fewest = packing.stop
        if packing.count is not None:
            fewest = int(packing.count.min()) if len(packing.count) else 0
        # The next block to be scored may be the present one again.
        base = max(past.base, fewest // self.block_size * self.block_size - self.block_size + 1)
        held_logits = None if logits is None else logits.detach()
        return y, DHSAState(
            past.length + x.shape[1],
            key,
            value,
            packing.count,
            base,
            recent[:, :, base - past.base :],
            held_logits,
        )

    def _logits(
        self, key: Float[Tensor, "b h m d"], past: DHSAState, packing: Packing
    ) -> Float[Tensor, "b 1 m 1"] | None:
        if self.predictor is None:
            return None
        w = self.predictor.window
        tokens = rearrange(key.detach(), "b h m d -> b m (h d)")
        # A gap is settled once the tokens after it are there; those before it begin w - 1 places earlier.
        first = max(0, packing.start - w)
        begin = max(0, first - w + 1)
        new = self.predictor(tokens[:, begin:])[:, first - begin :]
        old = tokens.new_zeros(len(tokens), 0) if past.logits is None else past.logits[:, 0, :first, 0]
        return torch.cat([old, new], dim=1)[:, None, :, None]

    def _loss(
        self, query: Tensor, key: Tensor, logits: Float[Tensor, "b 1 n 1"] | None, packing: Packing
    ) -> Float[Tensor, ""]:
        assert self.predictor is not None
        assert logits is not None
        logits, w = logits[:, 0, :, 0], self.predictor.window
        if packing.count is None:
            return boundary_loss(logits, attention_ratios(query, key, window=w))
        # Each row is as long as it has tokens.
        rows = []
        for b, count in enumerate(packing.count.tolist()):
            ratios = attention_ratios(query[b : b + 1, :, :count], key[b : b + 1, :, :count], window=w)
            rows.append(F.pad(ratios, (0, logits.shape[1] - count)))
        return boundary_loss(logits, torch.cat(rows))

    def _ends(self, logits: Tensor | None, tokens: int) -> tuple[Int[Tensor, "b c"], int]:
        """Ends of chunks, and how many tokens after an end it is certain."""
        if self.predictor is None or logits is None:
            assert self.chunk_size is not None
            number = torch.arange(1, tokens // self.chunk_size + 1, device=self.out.weight.device)
            return number[None] * self.chunk_size, 0
        w = self.predictor.window
        scores = logits[:, 0, :, 0].detach().clone()
        scores[:, : w - 1] = -100.0
        accepted = peak_boundaries(scores, threshold=self.threshold, distance=self.nms_window)
        return chunk_ends(accepted), w + self.nms_window - 1

    def _strict(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b hkv m d"],
        value: Float[Tensor, "b hkv m d"],
        logits: Tensor | None,
        recent: Float[Tensor, "b 1 t d"],
        base: int,
        packing: Packing,
    ) -> Float[Tensor, "b h n d"]:
        size, m = self.block_size, key.shape[2]
        block = torch.arange(packing.start // size, -(-packing.stop // size), device=query.device)
        begin = block * size
        # 3. A block's query: the mean of the last ones up to its first; a mean and a sum order chunks alike.
        place = begin[:, None] - torch.arange(size, device=query.device)
        blocks = recent[:, 0, (place - base).clamp(min=0)].masked_fill((place < 0)[..., None], 0).sum(2)
        # 4. Chunks that have ended before the block, and the open one behind them.
        ends, lag = self._ends(logits, m)
        ends = ends.expand(len(query), -1)
        known = (ends[:, None] + lag <= begin[:, None]).sum(-1, keepdim=True)
        begins = F.pad(ends, (1, 0))[:, None]
        start = begins.expand(-1, len(block), -1)
        number = torch.arange(start.shape[2], device=query.device)
        # An end that is not certain yet stands for no chunk; the open one ends where the block begins.
        stop = F.pad(ends, (0, 1))[:, None].where(number < known, start)
        stop = begin[:, None].where(number == known, stop)
        means = key.mean(1)
        closed = chunk_scores(blocks, means, begins, F.pad(ends, (0, 1), value=m)[:, None])
        open_start = start.gather(-1, known)
        opened = chunk_scores(blocks, means, open_start, begin[:, None].expand_as(open_start))
        scores = torch.where(number == known, opened, closed)
        # 5, 6. The budget: global and local tokens, then the best chunks'.
        high, low = begin + size, torch.zeros_like(begin)
        local = high.clamp(max=min(self.local_tokens, self.budget))
        pinned = (high - local).clamp(max=self.global_tokens).minimum(self.budget - local)
        picked = best_tokens(
            scores, start, stop, pinned, high - local, self.budget - local - pinned, self.budget
        )
        keys = with_ends(picked, low, pinned, high, local, self.budget)
        # 7. Attention.
        first = packing.start // size * size
        groups = key_groups(keys, block_size=size, n=query.shape[2], m=m, offset=packing.start, first=first)
        return self._attend(query, key, value, groups, packing.start)

    def _paper(
        self, query: Float[Tensor, "b h n d"], key: Tensor, value: Tensor, logits: Tensor | None
    ) -> Float[Tensor, "b h n d"]:
        n = query.shape[2]
        last = max(0, n - self.instruction_tokens)
        if self.predictor is None or logits is None:
            ends = self._ends(None, n - 1)[0].expand(len(query), -1)
            boundaries = F.pad(F.pad(ends, (1, 0)), (0, 1), value=n)
        else:
            boundaries = published_boundaries(
                logits[:, 0, :, 0],
                window=self.predictor.window,
                threshold=self.threshold,
                most=n // self.block_size * self.chunk_beta,
                distance=self.nms_window,
                end=last,
            )
        keys = chunk_topk(
            query[:, :, :last],
            key,
            boundaries,
            block_size=self.block_size,
            budget=self.budget,
            local_tokens=self.local_tokens,
            global_tokens=self.global_tokens,
        )
        groups = key_groups(keys, block_size=self.block_size, n=last, m=n)
        heads = self._attend(query[:, :, :last], key, value, groups, 0)
        # 8. The instruction at the end sees all.
        return torch.cat([heads, self._attend(query[:, :, last:], key, value, Causal(), last)], dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Any, offset: int) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attention(query, key, value, pattern=pattern, query_offset=offset, dropout_p=dropout)
