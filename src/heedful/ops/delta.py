"""The gated delta rule: a linear memory that corrects what it holds under a key instead of adding to it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice
from heedful.ops.linear import WITH_KERNEL, decay_sums, exp_in_two, fade
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

CHUNK = 64  # tokens whose writes are solved for together
SEGMENT = 1024  # tokens between two states that wait for the backward pass; a multiple of CHUNK


@register("gated-delta-rule", kind="op", paper="infinitevl", tags=("linear", "decode"), complexity="O(N D E)")
def gated_delta_rule(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    log_decay: Float[Tensor, "b h n"] | None = None,
    *,
    state: Float[Tensor, "b h d e"] | None = None,
    return_state: bool = False,
    form: str = "auto",
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """A memory S of d x e numbers a head; each token decays it, then moves what it holds at k towards v.

        S' = exp(log_decay_t) S_{t-1},    S_t = S' + k_t^T beta_t (v_t - k_t S'),    o_t = q_t S_t

    The output reads after the write. Nothing is scaled and no key is normalised: with |k| = 1 (see
    `l2_normalize`) and beta in (0, 1) a step never overshoots; beta |k|^2 above 2 lets S grow for ever.
    Without log_decay it is the delta rule (DeltaNet). A token with beta 0 and log_decay 0 takes no part.

    query, key    (b, h, n, d)
    value         (b, h, n, e)
    beta          (b, h, n), how far a token writes
    log_decay     (b, h, n), natural logarithms, <= 0 (not checked); None: nothing is lost; -inf forgets all
    state         S before the first token, (b, h, d, e), zeros if None
    return_state  also give the state after the last token: the call on the next tokens continues the sequence
    form          how, never what: "recurrent" (token by token, the definition), "chunked" (the writes of 64
                  tokens from one triangular system), "auto" (recurrent below 4 tokens, else chunked),
                  "kernel" (chunks in Triton, on CUDA; tested in Triton's interpreter and not yet measured on
                  a GPU, so that "auto" does not take it)

    Sums and state are float32, or float64 if any input is; the output has the dtype of query. Gradients of
    any order reach every tensor argument, of the first order alone with "kernel", where a second backward
    raises RuntimeError. Backward keeps one state for every 1024 tokens and computes the rest again; "kernel"
    keeps none, and one for every 64 tokens while a pass runs.

    Raises ValueError if shapes do not fit, `form` is unknown or "kernel" cannot serve (no Triton, not CUDA,
    float64, d above 256).
    Source: Gated Delta Networks, arXiv 2412.06464; the chunks, DeltaNet, arXiv 2406.06484.
    """
    _check(query, key, value, beta, log_decay, state, form)
    tensors = [t for t in (query, key, value, beta, log_decay, state) if t is not None]
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    batch, heads, n, dim = query.shape

    with no_autocast(query):
        if log_decay is None:
            log_decay = query.new_zeros(batch, heads, n, dtype=work)
        if state is None:
            state = query.new_zeros(batch, heads, dim, value.shape[-1], dtype=work)
        state = state.to(work)
        tokens = (query, key, value, beta, log_decay)
        if n == 0:
            out = query.to(work) @ state
        elif form == "recurrent" or (form == "auto" and n < 4):
            out, state = _recurrent(*tokens, state)
        elif form == "kernel":
            out, state = _kernel(*tokens, state)
        else:
            sizes = segment_sizes(n, segment=SEGMENT, chunk=CHUNK)
            out, state = in_segments(_segment, tokens, (state,), sizes=sizes, keep=SEGMENT)
        out = out.to(query.dtype)
    return (out, state) if return_state else out


def l2_normalize(x: Float[Tensor, "*rows d"], eps: float = 1e-6) -> Float[Tensor, "*rows d"]:
    """x / sqrt(sum(x^2) + eps) along the last axis, in float32 or wider; a zero vector stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    form: str,
) -> None:
    check_choice("form", form, WITH_KERNEL)
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, must be (b, h, n, d)")
    b, h, n, d = query.shape
    if value.ndim != 4 or value.shape[:3] != (b, h, n):
        raise ValueError(f"value has shape {tuple(value.shape)}, must be ({b}, {h}, {n}, e)")
    wanted = {
        "key": (key, (b, h, n, d)),
        "beta": (beta, (b, h, n)),
        "log_decay": (log_decay, (b, h, n)),
        "state": (state, (b, h, d, value.shape[-1])),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, must be {shape}")


def _recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. State and result have the dtype of S."""
    q, k, v, beta, g = (x.to(S.dtype) for x in (q, k, v, beta, g))
    decay = g.exp()[..., None, None]
    outs = []
    for t in range(q.shape[2]):
        S = decay[:, :, t] * S
        write = beta[:, :, t, None] * (v[:, :, t] - (k[:, :, t, None] @ S)[:, :, 0])
        S = S + k[:, :, t, :, None] * write[:, :, None]
        outs.append((q[:, :, t, None] @ S)[:, :, 0])
    return torch.stack(outs, dim=2), S


@torch.compiler.disable
def _kernel(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    from heedful.ops.backends.triton.recurrences import check_served

    check_served(query=q, key=k, value=v, beta=beta, log_decay=g, state=S)
    if q.numel() == 0 or v.numel() == 0:
        return _segment(q, k, v, beta, g, S)
    from heedful.ops.backends.triton.delta import WIDEST, gated_delta_rule

    if q.shape[-1] > WIDEST:
        raise ValueError(f"query has width {q.shape[-1]}, must be at most {WIDEST} for form='kernel'")
    return gated_delta_rule(q, k, v, beta.float(), g.float(), S, q.dtype)


def _segment(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """t chunks of c tokens: inside a chunk the writes depend on each other, between chunks on the state.

    The writes u of a chunk solve (1 + A) u = beta v - beta exp(G) k S with A the strictly lower part of
    beta (k k^T) exp(G_i - G_j), S the state before the chunk and G the sum of log_decay since its start.
    """
    c = min(CHUNK, q.shape[2])
    q, k, v, beta, g = (x.to(S.dtype).unflatten(2, (-1, c)) for x in (q, k, v, beta, g))
    beta = beta[..., None]

    # Exponents are sums of log_decay over the tokens between, all <= 0, and never differences.
    between = decay_sums(g)
    decay = between.exp()
    sums = g.cumsum(-1)[..., None]
    since, until = sums.exp(), decay[..., -1, :, None]

    lower = (beta * (k @ k.mT) * decay).tril(-1)
    right = beta * torch.cat([v, k * since], dim=-1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    fresh, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # u = fresh - erased S

    left, kept = (k * until).mT, exp_in_two(sums[..., -1:, :])
    before, writes = [], []
    chunks = (x.unbind(2) for x in (fresh, erased, left, *kept))
    for fresh_t, erased_t, left_t, *kept_t in zip(*chunks, strict=True):
        before.append(S)
        writes.append(fresh_t - erased_t @ S)
        S = fade(S, *kept_t) + left_t @ writes[-1]
    out = ((q @ k.mT) * decay) @ torch.stack(writes, dim=2) + (q * since) @ torch.stack(before, dim=2)
    return out.flatten(2, 3), S
