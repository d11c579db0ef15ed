"""A memory that is a small network: each token moves its weights by one step of gradient descent."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.ops.linear import FORMS, decay_sums
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

CHUNKS = 16  # chunks between two states that wait for the backward pass


class MemoryState(NamedTuple):
    """All weights of the network side by side, p numbers; `inside` tokens of the current chunk were seen."""

    inside: int
    reference: Float[Tensor, "b h p"]  # the weights before the current chunk, where gradients are taken
    weights: Float[Tensor, "b h p"]
    momentum: Float[Tensor, "b h p"]


@register("neural-memory-update", kind="op", paper="titans", tags=("memory", "decode"), complexity="O(N P)")
def neural_memory_update(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    step: Float[Tensor, "b h n"],
    log_momentum: Float[Tensor, "b h n"],
    log_keep: Float[Tensor, "b h n"],
    *,
    widths: Sequence[int],
    state: MemoryState,
    write: Float[Tensor, "b h n"] | None = None,
    chunk_size: int = 16,
    return_state: bool = False,
    form: str = "auto",
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], MemoryState]:
    """Write every token into the weights of a network M, and read each query after its own token.

        M(x) = silu(... silu(x W_1) W_2 ...) W_L,   l(W; k, v) = |M(k) - v|^2
        S_t = momentum_t S_(t-1) - step_t grad l(W_ref; k_t, v_t)
        W_t = keep_t W_(t-1) + write_t S_t,   o_t = M(q_t; W_t)

    W_ref are the weights before the chunk of `chunk_size` tokens that t lies in; chunks count from the first
    token of the sequence. With chunk_size 1, gradients are taken at W_(t-1).

    query, key    (b, h, n, d)
    value         (b, h, n, e)
    step          (b, h, n), step of the descent, at least 0
    log_momentum  (b, h, n), natural logarithm of what stays of S, <= 0
    log_keep      (b, h, n), natural logarithm of what stays of W, <= 0; -inf forgets all
    widths        d, the hidden widths, e: layer l maps widths[l] to widths[l + 1]
    state         before the first token; `initial_memory` makes one of weights
    write         (b, h, n), 1 if None; 0 with step, log_momentum and log_keep 0: the token takes no part
    return_state  also give the state after the last token: the call on the next tokens continues the sequence
    form          how, never what: "recurrent" (the weights after every token), "chunked" (no weights inside a
                  chunk: gradients of a layer are outer products, so a read is a product of queries and keys
                  with weights of pairs), "auto" (recurrent below 4 tokens)

    Sums and state are float32, or float64 if any input is; the output has the dtype of query. Gradients of
    any order reach every tensor. Backward keeps one state for every 16 chunks and computes the rest again.
    Raises ValueError if shapes do not fit or `form` is unknown.
    Source: Titans, arXiv 2501.00663.
    """
    tokens = [query, key, value, step, log_momentum, log_keep]
    tokens.append(torch.ones_like(step) if write is None else write)
    _check(tokens, widths, state, chunk_size, form)
    inside, *states = state
    work = torch.float64 if any(t.dtype == torch.float64 for t in (*tokens, *states)) else torch.float32
    shapes = list(itertools.pairwise(widths))
    n = query.shape[2]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        """Whole chunks, or one that begins here."""
        pieces, (reference, weights, momentum) = given[:7], given[7:]
        outs = []
        for chunk in zip(*(x.split(chunk_size, dim=2) for x in pieces), strict=True):
            reference = weights
            out, weights, momentum = one(chunk, reference, weights, momentum, shapes)
            outs.append(out)
        return torch.cat(outs, dim=2), reference, weights, momentum

    with no_autocast(query):
        tokens, states = [x.to(work) for x in tokens], [x.to(work) for x in states]
        one = _recurrent if form == "recurrent" or (form == "auto" and n < 4) else _chunk
        outs = []
        first = min((chunk_size - inside) % chunk_size, n)  # what the chunk of the state still takes
        if first:
            begun, tokens = [x[:, :, :first] for x in tokens], [x[:, :, first:] for x in tokens]
            out, states[1], states[2] = one(begun, states[0], states[1], states[2], shapes)
            outs.append(out)
        if n > first:
            sizes = segment_sizes(n - first, segment=CHUNKS * chunk_size, chunk=chunk_size)
            out, *states = in_segments(run, tokens, states, sizes=sizes, keep=CHUNKS * chunk_size)
            outs.append(out)
        joined = torch.cat(outs, dim=2) if outs else value
        joined = joined.to(query.dtype)
    return (joined, MemoryState((inside + n) % chunk_size, *states)) if return_state else joined


def read_memory(
    query: Float[Tensor, "b h n d"], weights: Float[Tensor, "b h p"], *, widths: Sequence[int]
) -> Float[Tensor, "b h n e"]:
    """M(q) with the same weights for all tokens: reading without a write. The dtype is that of query."""
    work = torch.promote_types(weights.dtype, query.dtype)
    with no_autocast(query):
        x = query.to(work)
        *hidden, last = _layers(weights.to(work), list(itertools.pairwise(widths)))
        for layer in hidden:
            x = F.silu(x @ layer)
        return (x @ last).to(query.dtype)


def initial_memory(weights: Sequence[Float[Tensor, "h _ _"]], batch: int) -> MemoryState:
    """The state before the first token, of the weights of every layer, the same for all batch rows."""
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)).flatten(1) for w in weights]
    flat = torch.cat(wide, dim=1).expand(batch, -1, -1)
    return MemoryState(0, flat, flat, torch.zeros_like(flat))


def _check(
    tokens: Sequence[Tensor], widths: Sequence[int], state: MemoryState, chunk_size: int, form: str
) -> None:
    check_choice("form", form, FORMS)
    check_positive("chunk_size", chunk_size)
    if tokens[0].ndim != 4:
        raise ValueError(f"query has shape {tuple(tokens[0].shape)}, must be (b, h, n, d)")
    b, h, n, d = tokens[0].shape
    if len(widths) < 2 or widths[0] != d:
        raise ValueError(
            f"widths is {list(widths)}, must begin with {d}, the channels of query, and end with e"
        )
    wanted: dict[str, tuple[int, ...]] = {"key": (b, h, n, d), "value": (b, h, n, widths[-1])}
    wanted |= dict.fromkeys(("step", "log_momentum", "log_keep", "write"), (b, h, n))
    for (name, shape), given in zip(wanted.items(), tokens[1:], strict=True):
        if given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, must be {shape}")
    size = (b, h, sum(i * o for i, o in itertools.pairwise(widths)))
    for given in state[1:]:
        if given.shape != size:
            raise ValueError(f"state has tensors of shape {tuple(given.shape)}, must be {size}")


def _layers(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([i * o for i, o in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _gradients(k: Tensor, v: Tensor, layers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs a_l of each layer and gradients e_l of its outputs: that of W_l at a token is a_l^T e_l."""
    inputs, sums = [k], []
    for layer in layers:
        sums.append(inputs[-1] @ layer)
        inputs.append(F.silu(sums[-1]))
    errors = [2 * (sums[-1] - v)]
    for layer, z in zip(reversed(layers[1:]), reversed(sums[:-1]), strict=True):
        gate = z.sigmoid()
        errors.append((errors[-1] @ layer.mT) * gate * (1 + z * (1 - gate)))
    return inputs[:-1], errors[::-1]


def _recurrent(
    tokens: Sequence[Tensor],
    reference: Tensor,
    weights: Tensor,
    momentum: Tensor,
    shapes: list[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, for tokens of one chunk."""
    q, k, v, step, log_momentum, log_keep, write = tokens
    layers = _layers(reference, shapes)
    outs = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        inputs, errors = _gradients(k[:, :, now], v[:, :, now], layers)
        gradient = torch.cat([(a.mT @ e).flatten(2) for a, e in zip(inputs, errors, strict=True)], dim=-1)
        momentum = log_momentum[:, :, now].exp() * momentum - step[:, :, now] * gradient
        weights = log_keep[:, :, now].exp() * weights + write[:, :, now] * momentum
        x = q[:, :, now]
        *hidden, last = _layers(weights, shapes)
        for layer in hidden:
            x = F.silu(x @ layer)
        outs.append(x @ last)
    return torch.cat(outs, dim=2), weights, momentum


def _chunk(
    tokens: Sequence[Tensor],
    reference: Tensor,
    weights: Tensor,
    momentum: Tensor,
    shapes: list[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of one chunk together. The weights after token t are

        W_t = old_t W + moved_t S + sum_(i <= t) pairs_ti a_i^T e_i

    with W and S those before the chunk. Exponents are sums of logarithms, all <= 0.
    """
    q, k, v, step, log_momentum, log_keep, write = tokens
    inputs, errors = _gradients(k, v, _layers(reference, shapes))
    carried = decay_sums(log_momentum).exp() * -step[..., None, :]  # what token i adds to S_t
    written = decay_sums(log_keep).exp() * write[..., None, :]  # what S_s adds to W_t
    pairs = written @ carried
    since = log_momentum.cumsum(-1)[..., None].exp()
    old, moved = log_keep.cumsum(-1)[..., None].exp(), written @ since

    x, layers = q, zip(_layers(weights, shapes), _layers(momentum, shapes), inputs, errors, strict=True)
    new_weights, new_momentum = [], []
    for number, (W, S, a, e) in enumerate(layers, start=1):
        x = old * (x @ W) + moved * (x @ S) + ((x @ a.mT) * pairs) @ e
        x = F.silu(x) if number < len(shapes) else x
        changes = [(a * last[..., -1, :, None]).mT @ e for last in (pairs, carried)]
        new_weights.append((old[..., -1:, :] * W + moved[..., -1:, :] * S + changes[0]).flatten(2))
        new_momentum.append((since[..., -1:, :] * S + changes[1]).flatten(2))
    return x, torch.cat(new_weights, dim=-1), torch.cat(new_momentum, dim=-1)
