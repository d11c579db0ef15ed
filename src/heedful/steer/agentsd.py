"""AgentSD: faster image generation, by merged tokens and agents in the self-attention of a trained model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.ops.attention import attention
from heedful.ops.token_merge import match_tokens
from heedful.registry import register


@dataclass(frozen=True)
class MergePhase:
    """How tokens are merged from call `start` of the model on.

    stride       (height, width) of the cells with one target each
    ratio        share of all tokens that are merged into targets
    agent_ratio  the same for the agents
    """

    start: int
    stride: tuple[int, int]
    ratio: float
    agent_ratio: float


PHASES = (MergePhase(0, (4, 4), 0.4, 0.95), MergePhase(20, (2, 2), 0.4, 0.5))


def agent_read(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h n d"],
    agents: Float[Tensor, "b h a d"],
    *,
    power: float = 0.3,
    shortcut: float = 0.075,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention through agents, for weights that were trained without them.

        u = softmax(A k^T / sqrt(d)) v,   y = softmax(d^(-power / 2) q A^T) u + shortcut v

    The second softmax is sharper than usual, and the shortcut keeps what agents blur. power 1 and shortcut 0:
    generalised linear attention as in Agent Attention. Source: Agent Attention, arXiv 2312.08874.
    """
    u = attention(agents, key, value)
    y = attention(query, agents, u, scale=query.shape[-1] ** (-0.5 * power))  # type: ignore[arg-type]
    return y + shortcut * value  # type: ignore[operator]


@register("agentsd", kind="steer", paper="agent-attention", tags=("training-free", "image generation"))
class AgentSD:
    """Context manager: self-attention over merged tokens, through agents where that saves enough.

    In every self-attention module of a diffusion network on latent maps, (b, c, height, width), tokens are
    matched by their inputs (`heedful.ops.token_merge.match_tokens`). The best matches are merged, attention
    runs on what is left, and results are copied back. Agents are the tokens merged further; they are used
    if twice their number is below that of the merged tokens.

        with AgentSD()(unet):
            ...  # sample

    A module counts as self-attention if it has to_q, to_k, to_v, to_out and heads, if to_q and to_k take the
    same width, and if it is called without a context; its forward takes tokens (b, n, c). The map of a module
    is that of the model's first argument, smaller by what its number of tokens says.

    phases          what is merged, by the number of calls of the model since the context was entered
    max_downsample  the largest factor by which the map of a module may be smaller
    power, shortcut see `agent_read`
    generator       places of targets are drawn from it; None: the first place of each cell

    The model is as before on leaving, also after an exception. Raises ValueError if no module fits.
    Source: Agent Attention, arXiv 2312.08874.
    """

    def __init__(
        self,
        *,
        phases: tuple[MergePhase, ...] = PHASES,
        max_downsample: int = 1,
        power: float = 0.3,
        shortcut: float = 0.075,
        generator: torch.Generator | None = None,
    ) -> None:
        if not phases or phases[0].start != 0:
            raise ValueError(f"phases is {phases}, must hold at least one, the first with start 0")
        self.phases, self.max_downsample = phases, max_downsample
        self.power, self.shortcut, self.generator = power, shortcut, generator
        self.calls = 0
        self.size: tuple[int, int] | None = None  # of the model's current input

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """Change the model's self-attention inside the `with` block."""
        found = [module for module in model.modules() if _is_self_attention(module)]
        if not found:
            raise ValueError(
                f"model {type(model).__name__} has no self-attention, must have modules with to_q, to_k, to_v"
            )
        self.calls = 0
        before = [module.__dict__.get("forward") for module in found]
        handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        try:
            for module in found:
                module.forward = self._wrapped(module, module.forward)  # type: ignore[method-assign]
            yield model
        finally:
            for handle in handles:
                handle.remove()
            for module, old in zip(found, before, strict=True):
                if old is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = old

    def phase(self) -> MergePhase:
        """What holds in the current call."""
        return [phase for phase in self.phases if phase.start <= self.calls][-1]

    def attend(self, module: Any, merged: Tensor, agents: Tensor) -> Tensor:
        """The module's attention over merged tokens, through agents."""
        q, k, v, a = (
            rearrange(project(x), "b n (h d) -> b h n d", h=module.heads)
            for project, x in (
                (module.to_q, merged),
                (module.to_k, merged),
                (module.to_v, merged),
                (module.to_q, agents),
            )
        )
        y = rearrange(
            agent_read(q, k, v, a, power=self.power, shortcut=self.shortcut), "b h n d -> b n (h d)"
        )
        for layer in module.to_out if isinstance(module.to_out, nn.ModuleList) else [module.to_out]:
            y = layer(y)
        return y

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent = args[0] if args else next(iter(kwargs.values()))
        self.size = (latent.shape[-2], latent.shape[-1])

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.calls, self.size = self.calls + 1, None

    def _wrapped(self, module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            size = self._map(x)
            context = (*args, *kwargs.values())
            if size is None or any(isinstance(given, Tensor) for given in context):
                return forward(x, *args, **kwargs)
            phase, n = self.phase(), x.shape[1]
            match = match_tokens(x, size=size, stride=phase.stride, generator=self.generator)
            count, agent_count = (
                min(int(n * ratio), match.source.shape[1]) for ratio in (phase.ratio, phase.agent_ratio)
            )
            merged = match.merge(x, count)
            if 2 * (n - agent_count) < merged.shape[1]:
                y = self.attend(module, merged, match.merge(x, agent_count))
            else:
                y = forward(merged, *args, **kwargs)
            return match.unmerge(y, count)

        return attend

    def _map(self, x: Tensor) -> tuple[int, int] | None:
        """The map of a module's tokens, None if it is too small or unknown."""
        if self.size is None or x.ndim != 3 or not x.shape[1]:
            return None
        height, width = self.size
        factor = math.ceil(math.sqrt(height * width / x.shape[1]))
        size = (math.ceil(height / factor), math.ceil(width / factor))
        fits = math.prod(size) == x.shape[1] and factor <= self.max_downsample
        stride = self.phase().stride
        return size if fits and size[0] >= stride[0] and size[1] >= stride[1] else None


def _is_self_attention(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")):
        return False
    return bool(module.to_q.in_features == module.to_k.in_features)  # type: ignore[union-attr]
