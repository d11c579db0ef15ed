"""TransNormerLLM: a decoder of linear attention with decay and gated linear units without activation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_mask, check_positive
from heedful.mixers.linear.lightning_attention_2 import LightningAttention2, LinearState, srms_norm
from heedful.models.stack import StackState
from heedful.registry import register


class SGLU(nn.Module):
    """y = (x W_1 * x W_2) W_3, without biases and without activation (arXiv 2307.14995)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.l1 = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.l2 = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.l3 = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerBlock(nn.Module):
    """x += mixer(norm(x));  x += mlp(norm(x)), with norm(x) = x / sqrt(mean(x^2) + eps).

    mixer   a `LightningAttention2`;  hidden  inner width of the MLP, a `SGLU`
    Source: TransNormerLLM, arXiv 2307.14995; Lightning Attention, arXiv 2405.17381.
    """

    def __init__(
        self,
        mixer: LightningAttention2,
        *,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = SGLU(mixer.dim, hidden, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        state: LinearState,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], LinearState]:
        mixed, state = self.mixer(srms_norm(x), mask=mask, state=state)
        x = x + mixed
        return x + self.mlp(srms_norm(x)), state


@register(
    "transnormer-llm",
    kind="model",
    paper="lightning-attention",
    tags=("language model", "linear", "decay"),
    causal="always",
    decode=True,
)
class TransNormerLLM(nn.Module):
    """A causal language model of linear cost and a state of fixed size.

        x = sqrt(dim) E[ids];  blocks (see `TransNormerBlock`), positions (LRPE) in the first alone
        logits = norm(x) W

    vocabulary  tokens
    dim, depth, heads, hidden  channels, layers, heads, inner width of the MLP; the released defaults

    forward: ids (b, n), mask (b, n) with True = a token; with a state (from `init_state`) the ids continue
    the sequences and (logits, state) comes back. Weights start from N(0, 0.02^2).
    Source: TransNormerLLM, arXiv 2307.14995.
    """

    example: ClassVar[dict[str, Any]] = {"vocabulary": 32, "dim": 16, "depth": 3, "heads": 4, "hidden": 24}

    def __init__(
        self,
        vocabulary: int = 64000,
        dim: int = 1024,
        *,
        depth: int = 24,
        heads: int = 8,
        hidden: int = 2816,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("depth", depth), ("hidden", hidden)):
            check_positive(name, value)
        self.dim = dim
        self.embed = nn.Embedding(vocabulary, dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList()
        for i in range(depth):
            mixer = LightningAttention2(
                dim, heads=heads, layer_index=i, layers=depth, lrpe=i == 0, device=device, dtype=dtype
            )
            self.layers.append(TransNormerBlock(mixer, hidden=hidden, device=device, dtype=dtype))
        self.head = nn.Linear(dim, vocabulary, bias=False, device=device, dtype=dtype)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def init_state(self, batch: int) -> StackState:
        """The state before the first token of `batch` sequences."""
        check_positive("batch", batch)
        return StackState(tuple(layer.mixer.init_state(batch) for layer in self.layers))  # type: ignore[operator, union-attr]

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: StackState | None = None,
    ) -> Float[Tensor, "b n v"] | tuple[Float[Tensor, "b n v"], StackState]:
        check_mask("mask", mask, ids.shape[0], ids.shape[1])
        before = (self.init_state(max(1, len(ids))) if state is None else state).layers
        x, after = self.embed(ids) * self.dim**0.5, []
        for layer, old in zip(self.layers, before, strict=True):
            x, new = layer(x, old, mask=mask)
            after.append(new)
        logits = self.head(srms_norm(x))
        return logits if state is None else (logits, StackState(tuple(after)))
