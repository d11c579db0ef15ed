"""No sparse or linear sequence mixer holds a buffer of queries times keys, forward or backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heedful import registry
from heedful.bench.mechanisms import INNER_TRAINING, sparse_mixers

# What is small beside the lengths below; all else is the default.
GIVEN: dict[str, dict[str, Any]] = {
    "core-context-aware": {"window": 64},
    "dhsa": {"block_size": 32, "budget": 128, "local_tokens": 32, "global_tokens": 32},
    "dynamic-mask-attention": {"window": 64},
    "flowformer": {"causal": True},
    "flux-attention": {"block_size": 32},
    "hebbian-attention": {"causal": True},
    "hierarchical-self-attention": {"causal": True},
    "landmark-attention": {"block_size": 31},
    "ls-attention": {"causal": True, "window": 64},
    "moa": {"block_size": 32},
    "pavlovian-attention": {"causal": True},
    "power-attention": {"window": 2, "block_size": 32},
    "routing-transformer": {"window": 64, "local_block": 32},
    "s2-attention": {"causal": True, "block_size": 32, "local_blocks": 2},
    "scatterbrain": {"causal": True, "window": 64},
    "streaming-llm": {"window": 64},
    "titans-mag": {"window": 64},
    "titans-mal": {"window": 64},
}


class Sizes(TorchDispatchMode):
    """The numbers of the largest tensor made, and of all that is kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.kept = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, _cells(x))
        return out

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        where = x.untyped_storage().data_ptr()  # a storage that is kept is not given to another tensor
        if where not in self.seen:
            self.seen.add(where)
            self.kept += _cells(x)
        return x


def _cells(x: torch.Tensor) -> int:
    """Of the storage: an expanded tensor takes no room."""
    return x.untyped_storage().nbytes() // x.element_size()


def sizes(name: str, n: int) -> Sizes:
    torch.manual_seed(0)
    mixer = registry.find(name).load()(16, heads=2, **GIVEN.get(name, {}))
    x = torch.randn(1, n, 16, requires_grad=True)
    found = Sizes()
    with found, torch.autograd.graph.saved_tensors_hooks(found.keep, lambda x: x):
        (mixer(x).sum() + sum(mixer.aux_losses.values())).backward()
    return found


@pytest.mark.parametrize("name", sparse_mixers())
def test_buffers_grow_with_the_length_and_not_with_its_square(name):
    # What is held a piece at a time is held up to 2^23 numbers: the square of the length must be more.
    n = 1024 if name in INNER_TRAINING else 4096  # for the time these take
    short, long = sizes(name, n // 2), sizes(name, n)
    assert long.largest < n * n / 2
    assert long.largest < 3 * short.largest
    assert long.kept < 3 * short.kept


def test_a_square_buffer_is_noticed():
    n = 1024
    found = Sizes()
    q = torch.randn(1, n, 4, requires_grad=True)
    with found, torch.autograd.graph.saved_tensors_hooks(found.keep, lambda x: x):
        ((q @ q.mT).softmax(-1) @ q).sum().backward()
    assert found.largest >= n * n
    assert found.kept >= n * n
