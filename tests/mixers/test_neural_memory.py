from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from heedful import create
from heedful.mixers.linear.neural_memory import NeuralMemory
from heedful.ops import neural_memory as op
from heedful.ops.delta import gated_delta_rule
from heedful.ops.neural_memory import MemoryState, initial_memory, neural_memory_update

RATES = ("step", "log_momentum", "log_keep")


def draw(n: int, widths: list[int], *, b: int = 2, h: int = 2, dtype: torch.dtype = torch.float64):
    """Tokens, and the weights that the memory starts from."""
    generator = torch.Generator().manual_seed(n)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = {
        "query": normal(b, h, n, widths[0]),
        "key": F.normalize(normal(b, h, n, widths[0]), dim=-1),
        "value": normal(b, h, n, widths[-1]),
        "step": normal(b, h, n).sigmoid() / 10,
        "log_momentum": F.logsigmoid(normal(b, h, n)),
        "log_keep": F.logsigmoid(normal(b, h, n) + 2),
    }
    weights = [normal(h, i, o) / i**0.5 for i, o in itertools.pairwise(widths)]
    return (
        {name: x.to(dtype).requires_grad_() for name, x in tokens.items()},
        [w.to(dtype).requires_grad_() for w in weights],
    )


def network(x: Tensor, weights: list[Tensor]) -> Tensor:
    for w in weights[:-1]:
        z = x @ w
        x = z / (1 + torch.exp(-z))
    return x @ weights[-1]


def literal(
    tokens: dict[str, Tensor], weights: list[Tensor], chunk: int, write: Tensor | None = None
) -> Tensor:
    """The equations of the paper token by token, with autograd for the inner gradient."""
    batch, heads, n = tokens["step"].shape
    out = []
    for b in range(batch):
        for h in range(heads):
            W = [w[h] for w in weights]
            S = [torch.zeros_like(w) for w in W]
            for t in range(n):
                if t % chunk == 0:
                    reference = W
                loss = (network(tokens["key"][b, h, t], reference) - tokens["value"][b, h, t]).square().sum()
                gradient = torch.autograd.grad(loss, reference, create_graph=True)
                step, momentum, keep = (tokens[name][b, h, t] for name in RATES)
                on = 1.0 if write is None else write[b, h, t]
                S = [momentum.exp() * s - step * g for s, g in zip(S, gradient, strict=True)]
                W = [keep.exp() * w + on * s for w, s in zip(W, S, strict=True)]
                out.append(network(tokens["query"][b, h, t], W))
    return torch.stack(out).reshape(batch, heads, n, -1)


def assert_same_with_gradients(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected)))


@pytest.mark.parametrize("widths", [[4, 3], [3, 5, 4], [3, 4, 5, 2]])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("form", ["recurrent", "chunked", "auto"])
def test_equals_gradient_descent_by_autograd(form, chunk, widths):
    tokens, weights = draw(10, widths)
    with patch.object(op, "CHUNKS", 1):  # all chunks are computed again in backward
        out = neural_memory_update(
            **tokens, widths=widths, state=initial_memory(weights, 2), chunk_size=chunk, form=form
        )
        assert_same_with_gradients(out, literal(tokens, weights, chunk), [*tokens.values(), *weights])


def test_a_matrix_without_momentum_is_the_delta_rule():
    tokens, weights = draw(70, [4, 5])
    nothing = torch.full_like(tokens["step"], -math.inf)
    out, state = neural_memory_update(
        **{**tokens, "log_momentum": nothing, "log_keep": torch.zeros_like(nothing)},
        widths=[4, 5],
        state=initial_memory(weights, 2),
        chunk_size=1,
        return_state=True,
    )
    expected, last = gated_delta_rule(
        *(tokens[name] for name in ("query", "key", "value")),
        2 * tokens["step"],
        state=weights[0].expand(2, -1, -1, -1),
        return_state=True,
    )
    assert_close(out, expected)
    assert_close(state.weights.unflatten(-1, (4, 5)), last)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_forgetting_all_leaves_the_momentum(form):
    tokens, weights = draw(9, [3, 5, 4])
    tokens["log_keep"] = torch.full_like(tokens["log_keep"], -math.inf)
    _, state = neural_memory_update(
        **tokens,
        widths=[3, 5, 4],
        state=initial_memory(weights, 2),
        chunk_size=4,
        return_state=True,
        form=form,
    )
    assert_close(state.weights, state.momentum)
    grads = torch.autograd.grad(state.weights.sum(), [tokens["step"], tokens["log_momentum"], *weights])
    assert all(g.isfinite().all() for g in grads)


@settings(max_examples=20)
@given(
    n=st.integers(0, 25),
    chunk=st.sampled_from([1, 3, 4]),
    cuts=st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["recurrent", "chunked"])), max_size=4),
)
def test_cutting_a_sequence_changes_nothing(n, chunk, cuts):
    tokens, weights = draw(n, [3, 5, 4])
    tokens = {name: x.detach() for name, x in tokens.items()}
    how = {"widths": [3, 5, 4], "chunk_size": chunk, "return_state": True}
    start, state, parts = 0, initial_memory(weights, 2), []
    whole, last = neural_memory_update(**tokens, **how, state=state, form="recurrent")
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        piece = {name: x[:, :, start:stop] for name, x in tokens.items()}
        with patch.object(op, "CHUNKS", 2):
            out, state = neural_memory_update(**piece, **how, state=state, form=form)
        parts.append(out)
        start = stop
    assert_close(torch.cat(parts, dim=2), whole)
    assert state.inside == last.inside == n % chunk
    assert_close(state[2:], last[2:])
    if n % chunk:
        assert_close(state.reference, last.reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_and_extreme_in_float32_stays_near_float64(dtype):
    n, widths = 8192, [4, 6, 4]
    tokens, weights = draw(n, widths, b=1, h=1, dtype=dtype)
    extremes = torch.tensor([0.0, -1e4, -math.inf, -1e-6, -2.0]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, many in (("log_momentum", extremes[1:]), ("log_keep", extremes)):
        tokens[name] = many[torch.randint(len(many), (1, 1, n), generator=generator)]
    with torch.no_grad():
        out, exact = (
            neural_memory_update(
                **{name: x.to(kind) for name, x in tokens.items()},
                widths=widths,
                state=initial_memory([w.to(kind) for w in weights], 1),
            )
            for kind in (dtype, torch.float64)
        )
    assert out.isfinite().all()
    tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


def build(**arguments) -> NeuralMemory:
    torch.manual_seed(0)
    mixer = create(
        "neural-memory", 12, heads=3, expansion=2, chunk_size=3, conv_size=3, dtype=torch.float64, **arguments
    )
    with torch.no_grad():
        mixer.norm.weight.normal_()
        mixer.step.bias.fill_(-2.0)
    return mixer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def by_hand(x: Tensor, mixer: NeuralMemory, write: Tensor, eps: float = 1e-5) -> Tensor:
    """The module step by step around the literal memory."""

    def heads(linear, conv) -> Tensor:
        z, taps = x @ linear.weight.T, conv.weight[:, 0]
        rows = []
        for t in range(z.shape[1]):
            back = range(min(t + 1, taps.shape[-1]))
            rows.append(sum(z[:, t - i] * taps[:, taps.shape[-1] - 1 - i] for i in back))
        return silu(torch.stack(rows, dim=1)).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)

    def rate(linear) -> Tensor:
        return (1 / (1 + torch.exp(-(x @ linear.weight.T + linear.bias)))).transpose(1, 2)

    query, key = heads(mixer.query, mixer.query_conv), heads(mixer.key, mixer.key_conv)
    tokens = {
        "query": query / torch.sqrt(query.square().sum(-1, keepdim=True) + 1e-6),
        "key": key / torch.sqrt(key.square().sum(-1, keepdim=True) + 1e-6),
        "value": heads(mixer.value, mixer.value_conv),
        "step": rate(mixer.step) * write,
        "log_momentum": rate(mixer.momentum).log() * write,
        "log_keep": (1 - rate(mixer.forget)).log() * write,
    }
    o = literal(tokens, list(mixer.memory), mixer.chunk_size, write).transpose(1, 2)
    o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + eps) * mixer.norm.weight
    return (o.flatten(2) * silu(x @ mixer.gate.weight.T)) @ mixer.out.weight.T


@pytest.mark.parametrize("arguments", [{}, {"memory_layers": 1, "eps": 0.1}])
def test_the_module(arguments):
    mixer = build(**arguments)
    x = torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)
    eps = arguments.get("eps", 1e-5)
    leaves = [x, *mixer.parameters()]
    everything = torch.ones(2, 3, 8, dtype=torch.float64)
    assert_same_with_gradients(mixer(x), by_hand(x, mixer, everything, eps), leaves)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    expected = by_hand(x * mask[..., None], mixer, everything * mask[:, None], eps)
    assert_same_with_gradients(mixer(x, mask=mask)[mask], expected[mask], leaves)


def test_decoding_equals_the_full_pass():
    mixer, x = build(), torch.randn(2, 70, 12, dtype=torch.float64)
    state, parts, sizes = mixer.init_state(2), [], set()
    for start, stop in [(0, 1), (1, 2), (2, 40), *((t, t + 1) for t in range(40, 70))]:
        y, state = mixer(x[:, start:stop], state=state)
        parts.append(y)
        sizes.add(state.nbytes())
    assert_close(torch.cat(parts, dim=1), mixer(x))
    assert sizes == {8 * 2 * (3 * 3 * 2 * 4 * 8 + 3 * 2 * 12)}


def test_it_learns_what_it_reads():
    """A pair seen again and again is recalled, with the rates that a new memory starts from."""
    torch.manual_seed(0)
    mixer = create("neural-memory", 16)
    key = F.normalize(torch.randn(1, 1, 1, 16), dim=-1).expand(1, 1, 200, 16)
    value = torch.randn(1, 1, 1, 16).expand(1, 1, 200, 16)
    rates = [
        torch.full((1, 1, 200), layer.bias.item()) for layer in (mixer.step, mixer.momentum, mixer.forget)
    ]
    read = neural_memory_update(
        key,
        key,
        value,
        rates[0].sigmoid(),
        F.logsigmoid(rates[1]),
        F.logsigmoid(-rates[2]),
        widths=mixer.widths,
        state=initial_memory(list(mixer.memory), 1),
    )
    error = (read - value).norm(dim=-1)[0, 0]
    assert error[-1] < 0.3 * error[0]  # not 0: the memory also forgets
    assert error[20:].max() < error[0]


def test_parameters():
    count = sum(p.numel() for p in create("neural-memory", 64, heads=4, device="meta").parameters())
    taps, rates, memory = 3 * 64 * 4, 3 * (64 * 4 + 4), 4 * 2 * 16 * 64
    assert count == 5 * 64 * 64 + taps + rates + memory + 16


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, "form is 'fast', must be one of"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"query": torch.zeros(3, 5, 4)}, r"query has shape \(3, 5, 4\), must be \(b, h, n, d\)"),
        ({"widths": [5, 4]}, r"widths is \[5, 4\], must begin with 3"),
        ({"key": torch.zeros(2, 2, 6, 3)}, r"key has shape .*, must be \(2, 2, 5, 3\)"),
        ({"value": torch.zeros(2, 2, 5, 3)}, r"value has shape .*, must be \(2, 2, 5, 4\)"),
        ({"step": torch.zeros(2, 2, 4)}, r"step has shape .*, must be \(2, 2, 5\)"),
        ({"log_keep": torch.zeros(2)}, r"log_keep has shape \(2,\), must be \(2, 2, 5\)"),
        ({"state": MemoryState(0, *[torch.zeros(2, 2, 11)] * 3)}, r"state has tensors of shape .*, must be"),
    ],
)
def test_errors(change, message):
    tokens, weights = draw(5, [3, 4])
    call = {**tokens, "widths": [3, 4], "state": initial_memory(weights, 2)}
    with pytest.raises(ValueError, match=message):
        neural_memory_update(**{**call, **change})


@pytest.mark.door
def test_errors_of_the_module():
    for arguments, message in (
        ({"heads": 5}, "heads is 5, must divide dim"),
        ({"memory_layers": 0}, "memory_layers is 0"),
        ({"expansion": 0}, "expansion is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create("neural-memory", 12, **arguments)
