"""FIT as a causal language model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.state import State
from heedful.models.block import make_norm
from heedful.models.fit import Trunk
from heedful.models.fit_stage import Made, StageState
from heedful.models.sampling import continue_ids
from heedful.models.stack import next_token_loss
from heedful.registry import register


class FITOutput(NamedTuple):
    """Logits of the next token, the loss where labels were given, the state where one was."""

    logits: Float[Tensor, "b n v"]
    loss: Float[Tensor, ""] | None = None
    state: FITState | None = None


@dataclass(frozen=True)
class FITState:
    """`length` tokens were seen; a state for each stage."""

    stages: tuple[StageState, ...]
    length: int = 0

    def reorder(self, index: Int[Tensor, " b"]) -> FITState:
        """The state whose batch row i is row `index[i]` of this one (beam search)."""

        def chosen(value: Any) -> Any:
            if isinstance(value, State):
                return value.reorder(index)
            if isinstance(value, tuple):
                return tuple(map(chosen, value))
            return None if value is None else value.index_select(0, index)

        def row(stage: StageState) -> StageState:
            return replace(stage, **{f.name: chosen(getattr(stage, f.name)) for f in fields(stage)})

        return replace(self, stages=tuple(map(row, self.stages)))


@register(
    "fit-ar",
    kind="model",
    paper="fit",
    tags=("language model", "groups", "latents"),
    causal="always",
    decode=True,
    complexity="O(N n C + (t m)^2 C)",
)
class FITAR(nn.Module):
    """FIT as a causal language model: near tokens in their group, far ones through the latents before it.

        local layers are causal inside a group; latents read their whole group and see no later one;
        a group reads the latents of the group before it, the first one zeros; logits = norm(x) E^T + bias

    The arguments are those of `FIT`, with a vocabulary; `tied` False: logits with a matrix of their own.
    groups x group_size tokens are the longest text. The latents of the last group, which no group reads, have
    no influence.

    forward: ids (b, n); labels (b, n), usually the ids: the loss is the mean cross entropy of each token
    given those before it, -100 left out. With a state (from `init_state`) the ids continue the sequences.
    Raises ValueError if heads do not divide, on wrong shapes and on texts that are too long.
    Source: FIT, arXiv 2305.12689.
    """

    example: ClassVar[dict[str, Any]] = {
        "vocabulary": 32,
        "dim": 16,
        "layers": "(1)1(1)",
        "groups": 4,
        "group_size": 4,
        "latents": 2,
        "heads": 4,
    }

    def __init__(
        self,
        vocabulary: int,
        dim: int = 512,
        *,
        layers: str = "(2)4(2)4(2)",
        groups: int,
        group_size: int,
        latents: int,
        latent_dim: int | None = None,
        heads: int = 8,
        latent_heads: int | None = None,
        mlp_ratio: int = 4,
        tied: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        check_positive("vocabulary", vocabulary)
        self.vocabulary, self.group_size, self.longest = vocabulary, group_size, groups * group_size
        self.embedding = nn.Embedding(vocabulary, dim, **made)
        self.trunk = Trunk(
            dim,
            groups=groups,
            group_size=group_size,
            latents=latents,
            latent_dim=latent_dim,
            layers=layers,
            heads=heads,
            latent_heads=latent_heads,
            mlp_ratio=mlp_ratio,
            causal=True,
            local_causal=True,
            made=made,
        )
        self.norm = make_norm("layer", dim, **made)
        self.head = None if tied else nn.Linear(dim, vocabulary, bias=False, **made)
        self.bias = nn.Parameter(torch.zeros(vocabulary, **made))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def init_state(self, batch: int) -> FITState:
        """The state before the first token."""
        return FITState(tuple(stage.start() for stage in self.trunk.stages))  # type: ignore[operator]

    def example_inputs(self, *, batch: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(self.vocabulary, (batch, length), generator=generator)}

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        labels: Int[Tensor, "b n"] | None = None,
        state: FITState | None = None,
    ) -> FITOutput:
        if ids.ndim != 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, must be (batch, tokens)")
        length = ids.shape[1] + (0 if state is None else state.length)
        if length > self.longest:
            raise ValueError(f"ids reaches {length} tokens, must be at most {self.longest}")
        x = self.embedding(ids)
        if state is None:
            n = self.group_size
            whole = F.pad(x, (0, 0, 0, -ids.shape[1] % n)).unflatten(1, (-1, n))  # nothing sees what is added
            x = self.trunk(whole)[0].flatten(1, 2)[:, : ids.shape[1]]
        else:
            pieces = []
            while x.shape[1]:
                piece, x = x.tensor_split([self.group_size - state.length % self.group_size], dim=1)
                piece, state = self._extend(piece, state)
                pieces.append(piece)
            x = torch.cat(pieces, dim=1) if pieces else x
        logits = F.linear(
            self.norm(x), (self.embedding if self.head is None else self.head).weight, self.bias
        )
        loss = None if labels is None else next_token_loss(logits, labels)
        return FITOutput(logits, loss, state)

    def _extend(self, x: Float[Tensor, "b n c"], state: FITState) -> tuple[Tensor, FITState]:
        """Tokens that do not reach beyond the open group."""
        trunk = self.trunk
        group, place = divmod(state.length, self.group_size)
        x = x + trunk.place[place : place + x.shape[1]]
        length, shape = state.length + x.shape[1], tuple(trunk.latents.shape[1:])
        stages = []
        for stage, kept in zip(trunk.stages, state.stages, strict=True):
            x, kept = stage.extend(x, kept, shape)  # type: ignore[operator]
            stages.append(kept)
        if length % self.group_size == 0:
            latents = trunk.latents[group].expand(len(x), -1, -1)
            for i, stage in enumerate(trunk.stages):
                latents, stages[i] = stage.close(latents, stages[i])  # type: ignore[operator]
        return x, FITState(tuple(stages), length)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b m"]:
        """The ids continued with a state; the arguments are those of `DecoderLM.generate`."""
        state: FITState | None = self.init_state(len(ids))

        def step(piece: Tensor) -> Tensor:
            nonlocal state
            logits, _, state = self(piece, state=state)
            return logits[:, -1]

        return continue_ids(
            step,
            ids,
            max_new_tokens,
            eos=eos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
