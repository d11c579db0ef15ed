"""Layer routers of Flux attention on a frozen Hugging Face model of the Llama and Qwen kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.progress import track
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from heedful.checks import check_positive
from heedful.hf.attention import Visible, attention_forward, visible_mask
from heedful.hf.cache_name import CACHE
from heedful.registry import register
from heedful.routing.layer_router import (
    LayerRouter,
    SparsityTarget,
    pool_ends,
    router_temperature,
    streaming_blocks,
)

NAME = "heedful-flux"


class FluxRouters:
    """The routers of a model, from `add_flux_router`, and what they decided.

    layers   attention modules that have a router, in order; each holds it as `flux_router`
    routers  the routers
    """

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], **branches: Any) -> None:
        self.model, self.layers = model, layers
        self.sparse = streaming_blocks(
            branches["block_size"], branches["sink_blocks"], branches["local_blocks"]
        )
        self.pool = branches["pool"]
        self.pool_mask: Bool[Tensor, "b n"] | None = None
        self._query: dict[nn.Module, Tensor] = {}
        self._full: dict[nn.Module, Float[Tensor, " b"]] = {}  # 1 = full, of the last prompt
        self._before = model.config._attn_implementation
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._hooks = []
        model.requires_grad_(False)
        for layer in layers:
            weight = layer.o_proj.weight  # type: ignore[union-attr]
            layer.flux_router = LayerRouter(layer.head_dim, device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
            layer.flux_router.train(layer.training)
            source = getattr(layer, "q_norm", layer.q_proj)  # what the rotary embedding turns
            assert isinstance(source, nn.Module)
            self._hooks.append(source.register_forward_hook(partial(self._keep, layer)))
            layer.flux = self  # type: ignore[assignment]
        model.set_attn_implementation(NAME)

    @property
    def routers(self) -> list[LayerRouter]:
        return [layer.flux_router for layer in self.layers]  # type: ignore[misc]

    @property
    def full(self) -> list[Float[Tensor, " b"]]:
        """Of each layer, 1 for rows of the last prompt that it attends in full, else 0."""
        return [self._full[layer] for layer in self.layers]

    @contextmanager
    def pooling(self, mask: Bool[Tensor, "b n"] | None) -> Iterator[None]:
        """Inside this context the routers look at those tokens of the prompt alone where mask is True."""
        self.pool_mask = mask
        try:
            yield
        finally:
            self.pool_mask = None

    def remove(self) -> None:
        """The model as it was before."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            del layer.flux_router, layer.flux
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.model.set_attn_implementation(self._before)

    def _keep(self, layer: nn.Module, module: nn.Module, given: Any, query: Tensor) -> None:
        self._query[layer] = query

    def decide(self, layer: nn.Module, seen: Visible) -> Float[Tensor, " b"]:
        """At the start of a text the router decides for it; what follows keeps to that."""
        query = self._query.pop(layer).unflatten(-1, (-1, layer.head_dim)).flatten(2, -2)  # type: ignore[arg-type]
        if seen.query_offset == 0:
            n = query.shape[1]
            real = None if seen.key_mask is None else seen.key_mask[:, :n].to(query.device)
            if self.pool_mask is not None:
                real = self.pool_mask if real is None else self.pool_mask & real
            pooled = pool_ends(query.transpose(1, 2), self.pool, real)
            self._full[layer] = layer.flux_router.decide(pooled)  # type: ignore[union-attr, operator]
        full = self._full.get(layer)
        if full is None or len(full) != len(query):
            raise ValueError(f"{CACHE} holds a text whose start these routers have not seen")
        return full


@register("add-flux-router", kind="convert", paper="flux-attention", tags=("layer", "router"))
def add_flux_router(
    model: PreTrainedModel,
    *,
    block_size: int = 128,
    sink_blocks: int = 1,
    local_blocks: int = 16,
    pool: int = 100,
) -> FluxRouters:
    """Freeze a model in place and let a router a layer choose between full attention and sinks with a window.

        z = router(mean over heads of the first and last `pool` queries of the prompt, before rotation)
        heads = z Attention(q, k, v) + (1 - z) Attention(q, k, v; sink and local blocks)

    z is decided with the prompt (the first call on a cache) and kept until the next prompt. In training mode
    of the routers both branches are computed and z passes gradients; else only the branch of the decision,
    and both where the rows of a batch decide differently. At the start every layer is full, and the model
    gives what it gave. Layers with a sliding window of their own get no router. Blocks count from the first
    position that the cache holds, padding included; the routers look at real tokens alone.

    model        a causal transformers model whose attention has q_proj and o_proj: Llama, Qwen, Mistral, ...
    block_size, sink_blocks, local_blocks   the sparse branch, see `streaming_blocks`
    pool         queries pooled at each end

    `train_flux_router` trains the routers; `FluxRouters.remove` takes them off again. Raises ValueError for
    another kind of model, or one that has routers.
    Source: Flux Attention, arXiv 2604.07394.
    """
    check_positive("sink_blocks", sink_blocks)
    check_positive("pool", pool)
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise ValueError(f"model is a {type(model).__name__}, must be a transformers model of the Llama kind")
    layers = [
        m
        for m in model.modules()
        if all(hasattr(m, a) for a in ("q_proj", "o_proj", "head_dim", "config"))
        and getattr(m, "is_causal", False)
        and getattr(m, "sliding_window", getattr(m.config, "sliding_window", None)) is None
    ]
    if not layers:
        raise ValueError(f"model is a {type(model).__name__}, which has no full attention of the Llama kind")
    if any(hasattr(layer, "flux") for layer in layers):
        raise ValueError("model has routers, must have none; `remove` takes them off")
    return FluxRouters(
        model,
        layers,
        block_size=block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        pool=pool,
    )


def train_flux_router(
    routers: FluxRouters,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 300,
    targets: Sequence[float] = (0.45, 0.45, 1.0, 1.0, 1.0),
    lr: float = 5e-4,
    multiplier_lr: float = 1e-3,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the routers alone: the model's own loss, and a pull of the share of sparse layers to a target.

    batches   what the model takes, with labels, one after the other and again; beside that "task", the index
              of its target (default 0), and "pool_mask" (b, n), the tokens that the routers look at
    targets   share of sparse layers for each task
    lr, multiplier_lr   of the routers, and of the multipliers of `SparsityTarget`, which go up

    Gives the loss of the model ("loss") and the share of sparse layers ("sparse") of every step. The model
    stays in eval mode; so do the routers, in the end.
    """
    check_positive("steps", steps)
    model = routers.model.eval()
    target = SparsityTarget(targets).to(model.device)
    own = [p for router in routers.routers for p in router.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": own, "lr": lr, "weight_decay": 0.1},
            {"params": list(target.parameters()), "lr": multiplier_lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    history = []
    for step in track(range(steps), "routers", disable=not progress):
        batch = dict(batches[step % len(batches)])
        task, pool_mask = batch.pop("task", 0), batch.pop("pool_mask", None)
        for router in routers.routers:
            router.train()
            router.temperature = router_temperature(step, steps)
        with routers.pooling(pool_mask):
            loss = model(**batch, use_cache=False).loss
        full = routers.full
        optimizer.zero_grad()
        (loss + target(full, task)).backward()
        nn.utils.clip_grad_norm_(own, 5.0)
        optimizer.step()
        history.append({"loss": loss.item(), "sparse": 1 - torch.stack(full).mean().item()})
    for router in routers.routers:
        router.eval()
    return history


def _forward(
    module: nn.Module,
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    value: Float[Tensor, "b hkv m e"],
    attention_mask: Visible | Tensor | None,
    **rest: Any,
) -> tuple[Float[Tensor, "b n hq e"], None]:
    """The attention function (the interface is transformers' AttentionInterface)."""
    routers: FluxRouters | None = getattr(module, "flux", None)
    if routers is None:
        return attention_forward(module, query, key, value, attention_mask, **rest)
    if not isinstance(attention_mask, Visible) or attention_mask.key_offset:
        raise ValueError(
            "attention_mask and cache must be of the plain kind: (batch, tokens), and all tokens"
        )

    def branch(pattern: Any) -> Tensor:
        return attention_forward(module, query, key, value, replace(attention_mask, pattern=pattern), **rest)[
            0
        ]

    full = routers.decide(module, attention_mask)
    shown = attention_mask.pattern
    narrow = routers.sparse if shown is None else shown & routers.sparse
    if not module.flux_router.training:  # type: ignore[union-attr]
        if full.all():
            return branch(shown), None
        if not full.any():
            return branch(narrow), None
    z = full[:, None, None, None]
    return z * branch(shown) + (1 - z) * branch(narrow), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, visible_mask)
