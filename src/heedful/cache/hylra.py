"""Layer reuse: some layers attend to all keys, the others to what the last of these found important."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer, config_of, full_layers
from heedful.cache.reuse_plan import check_sources, layer_overlap, layer_sensitivity, plan_layer_reuse
from heedful.cache.scores import last_log_weights
from heedful.checks import check_positive
from heedful.hf.attention import Visibility
from heedful.registry import register


@register("hylra", kind="cache", paper="hylra", tags=("cache", "reuse", "layers"))
class LayerReuseCache(PolicyCache):
    """A full cache of which most layers read only the entries that an earlier layer attended to.

        full layer    attends to all keys; S = its `tokens` entries with the largest weights of the last
                      query, averaged over heads, the first `sinks` and the last `recent` among them
        reuse layer   attends, in a step of one token, to its own keys and values at S of its source

    Prompts, and calls of several tokens, are full in every layer. Every layer keeps all its entries: the gain
    is time, not memory. Positions stay those of the text.

    model    a transformers model that runs attention implementation "heedful", or its configuration
    sources  for each layer None (full) or the full layer whose entries it reuses, the last one before it, as
             `plan_layer_reuse` gives them; entries of sliding layers do not count
    tokens   entries of S
    sinks, recent  always in S

    Raises ValueError on sources that name a layer that is not full or not before, on sizes that do not fit,
    and in the forward if attention does not run through heedful. Source: HyLRA, arXiv 2602.00777.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        sources: Sequence[int | None],
        tokens: int = 2048,
        sinks: int = 4,
        recent: int = 128,
    ) -> None:
        check_positive("tokens", tokens)
        check_positive("recent", recent)
        if sinks < 0 or sinks + recent > tokens:
            raise ValueError(
                f"sinks + recent is {sinks} + {recent}, must be at most tokens, which is {tokens}"
            )
        if len(sources) != config_of(model).num_hidden_layers:
            raise ValueError(
                f"sources has {len(sources)} entries, must have one for each of "
                f"{config_of(model).num_hidden_layers} layers"
            )
        check_sources(sources, full_layers(model))
        made: dict[int | None, LayerReuseLayer] = {}

        def make(i: int) -> LayerReuseLayer:
            made[i] = LayerReuseLayer(made.get(sources[i]), tokens, sinks, recent)
            return made[i]

        super().__init__(model, make)

    @classmethod
    def calibrated(
        cls,
        model: PreTrainedModel,
        samples: Iterable[Int[Tensor, "b n"]],
        *,
        tokens: int = 2048,
        overlap: float = 0.85,
        sensitivity: float = 0.1,
        sinks: int = 4,
        recent: int = 128,
    ) -> Self:
        """A cache whose full layers are planned on sample prompts.

        overlap      a layer may reuse a source with which it shares at least this part of its entries
        sensitivity  a layer whose output differs by more than this, relative to its size, when it alone
                     attends to its own `tokens` entries, is always full
        """
        samples = list(samples)
        if not samples:
            raise ValueError("samples is empty, must hold at least one batch of token ids")
        shared = layer_overlap(model, samples, tokens=tokens)
        errors = layer_sensitivity(model, samples, tokens=tokens).error
        own = full_layers(model)
        planned = plan_layer_reuse(shared[own][:, own], sensitive=errors[own] > sensitivity, overlap=overlap)
        sources: list[int | None] = [None] * len(shared)
        for i, source in zip(own, planned, strict=True):
            sources[i] = None if source is None else own[source]
        return cls(model, sources=sources, tokens=tokens, sinks=sinks, recent=recent)

    @classmethod
    def of_budget(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        budget: int,
        *,
        sources: Sequence[int | None] | None = None,
    ) -> Self:
        """Reuse of `budget` entries, an eighth of them recent; without sources, only layer 0 is full."""
        if budget < 8:
            raise ValueError(
                f"budget is {budget}, must be at least 8: sinks, recent tokens and what is chosen"
            )
        if sources is None:
            layers = config_of(model).num_hidden_layers
            first = min(full_layers(model), default=layers)
            sources = [None if i <= first else first for i in range(layers)]
        return cls(model, sources=sources, tokens=budget, sinks=min(4, budget // 8), recent=budget // 8)


class LayerReuseLayer(PolicyLayer):
    """One layer of a `LayerReuseCache`.

    source  the full layer whose choice this one reads; None for a full one
    chosen  (b, k) the choice of a full layer, after the last call
    """

    rows = (*PolicyLayer.rows, "chosen")

    def __init__(self, source: LayerReuseLayer | None, tokens: int, sinks: int, recent: int) -> None:
        super().__init__()
        self.source, self.tokens, self.sinks, self.recent = source, tokens, sinks, recent
        self.needs_queries = source is None  # type: ignore[misc]
        self.chosen: Int[Tensor, "b k"] | None = None
        self.single = False

    def store(self, key: Float[Tensor, "b hkv n d"], value: Float[Tensor, "b hkv n e"]) -> None:
        self.single = self.is_initialized and key.shape[2] == 1
        super().store(key, value)

    def read(self) -> tuple[Float[Tensor, "b hkv m d"], Float[Tensor, "b hkv m e"]]:
        if self.source is None or not self.single:
            return self.keys, self.values
        # The source has already chosen in this step: the newest token is the last of its recent ones.
        assert self.source.chosen is not None
        index = self.source.chosen[:, None, :, None]
        return (
            self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])),
            self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3])),
        )

    def readable(self) -> Bool[Tensor, "..."] | None:
        if self.valid is None or self.source is None or not self.single:
            return self.valid
        assert self.source.chosen is not None
        return self.valid.gather(1, self.source.chosen)

    def retain(self, query: Tensor | None, scale: float, told: Visibility | None) -> None:
        if self.source is not None:
            return
        assert query is not None
        assert told is not None
        weights = last_log_weights(query, self.keys, last=1, scale=scale, told=told)[:, :, 0]
        scores = weights.logsumexp(1)  # orders as the mean over heads does
        self.chosen = choose(scores, self.valid, tokens=self.tokens, sinks=self.sinks, recent=self.recent)

    def reset(self) -> None:
        super().reset()
        self.chosen = None


def choose(
    scores: Float[Tensor, "b m"],
    valid: Bool[Tensor, "b m"] | None,
    *,
    tokens: int,
    sinks: int,
    recent: int,
) -> Int[Tensor, "b k"]:
    """The places of the `tokens` largest scores, in order, the first `sinks` and last `recent` included."""
    m = scores.shape[1]
    held = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    rank = held.cumsum(1)  # 1 for a row's first token
    last = rank[:, -1:]
    forced = (rank <= sinks) | (rank > last - recent)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~held, -torch.inf)
    return scores.topk(min(tokens, m), dim=1).indices.sort(dim=1).values
