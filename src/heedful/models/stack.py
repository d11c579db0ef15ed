"""Token models: an embedding, blocks with any mixer in each, a norm, and logits of every token."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful import registry
from heedful.checks import check_choice, check_mask, check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.models.block import Block, make_norm

Choice = str | tuple[str, Mapping[str, Any]] | Callable[[int], nn.Module]
IGNORED = -100  # a label that does not count


@dataclass(frozen=True)
class StackState:
    """The states of all layers, after the same tokens."""

    layers: tuple[State, ...]

    @property
    def length(self) -> int:
        """Tokens seen, padding included."""
        return self.layers[0].length

    def reorder(self, index: Int[Tensor, " b"]) -> StackState:
        """The state whose batch row i is row `index[i]` of this one (beam search)."""
        return replace(self, layers=tuple(state.reorder(index) for state in self.layers))

    def nbytes(self) -> int:
        """Bytes held by the tensors of all layers."""
        return sum(state.nbytes() for state in self.layers)


class Output(NamedTuple):
    """What a token model gives: logits, the loss where labels were given, the state where one was."""

    logits: Float[Tensor, "b n v"]
    loss: Float[Tensor, ""] | None = None
    state: StackState | None = None


def spread(mixers: Choice | Sequence[Any], depth: int) -> list[Choice]:
    """The choice of each layer: one for all, or a pattern repeated until there are `depth` of them."""
    check_positive("depth", depth)
    alone = isinstance(mixers, str) or callable(mixers) or _is_named(mixers)
    given: Sequence[Any] = [mixers] if alone else mixers  # type: ignore[assignment, list-item]
    if not isinstance(given, list | tuple):
        raise ValueError(f"mixers is {mixers!r}, must be a name, a pair, a factory, or a list of such")
    pattern: list[Choice] = [tuple(c) if _is_named(c) else c for c in given]  # JSON knows no tuples
    if not 1 <= len(pattern) <= depth:
        raise ValueError(f"mixers has {len(pattern)} entries, must have 1 to {depth}, the depth")
    return [pattern[i % len(pattern)] for i in range(depth)]


def make_mixer(
    choice: Choice,
    dim: int,
    *,
    causal: bool,
    heads: int | None,
    rotary: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Mixer:
    """The mixer of one layer; heads, rotary and causal go to those that have such an argument.

    Raises ValueError if it is not a sequence mixer, needs more than x, or sees the future where it must not.
    """
    if isinstance(choice, str) or _is_named(choice):
        name, given = (choice, {}) if isinstance(choice, str) else choice  # type: ignore[misc]
        entry = registry.find(name)
        if entry.kind != "sequence":
            raise ValueError(f"mixers names {name!r}, a {entry.kind}; must name sequence mixers")
        made = entry.load()
        known = inspect.signature(made).parameters
        wanted: dict[str, Any] = {"heads": heads, "rotary": rotary}
        arguments = {k: v for k, v in wanted.items() if k in known and v is not None}
        if entry.causal == "optional":
            arguments["causal"] = causal
        mixer = made(dim, **{**arguments, **given}, device=device, dtype=dtype)
    elif callable(choice) and not isinstance(choice, nn.Module):
        mixer = choice(dim)
        if not isinstance(mixer, Mixer) or mixer.entry.kind != "sequence" or mixer.dim != dim:
            raise ValueError(
                f"mixers has a factory that gives {mixer!r}, must give a sequence mixer of {dim}"
            )
        name = mixer.entry.name
    else:
        raise ValueError(f"mixers has {choice!r}, must have a name, a pair (name, arguments) or a factory")
    forward = inspect.signature(mixer.forward).parameters
    for needed in mixer.entry.extra_inputs:
        if needed not in forward or forward[needed].default is inspect.Parameter.empty:
            raise ValueError(f"mixers names {name!r}, which needs {needed} beside x")
    if causal and not mixer.causal:
        raise ValueError(f"mixers names {name!r}, which sees the future as it is built; must be causal")
    return mixer


class Stack(nn.Module):
    """What `DecoderLM` and `Encoder` share; see them for the arguments."""

    causal: ClassVar[bool]

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        depth: int = 6,
        mixers: Choice | Sequence[Any] = "self-attention",
        heads: int | None = 8,
        rotary: bool = True,
        mlp: str = "swiglu",
        hidden: int | None = None,
        norm: str = "rms",
        tied: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("vocabulary", vocabulary)
        check_positive("dim", dim)
        choices = spread(mixers, depth)
        self.vocabulary, self.dim = vocabulary, dim
        self.config: dict[str, Any] = {  # what builds this model again
            "vocabulary": vocabulary,
            "dim": dim,
            "depth": depth,
            "mixers": choices if len(set(map(repr, choices))) > 1 else choices[0],
            "heads": heads,
            "rotary": rotary,
            "mlp": mlp,
            "hidden": hidden,
            "norm": norm,
            "tied": tied,
        }
        self.embedding = nn.Embedding(vocabulary, dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(
                make_mixer(
                    choice,
                    dim,
                    causal=self.causal,
                    heads=heads,
                    rotary=rotary,
                    device=device,
                    dtype=dtype,
                ),
                mlp=mlp,
                hidden=hidden,
                norm=norm,
                device=device,
                dtype=dtype,
            )
            for choice in choices
        )
        self.norm = make_norm(norm, dim, device=device, dtype=dtype)
        self.head = None if tied else nn.Linear(dim, vocabulary, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    @property
    def aux_losses(self) -> dict[str, Float[Tensor, ""]]:
        """Those of the mixers after a forward, as "layer.name"; the caller weighs and adds them."""
        return {f"{i}.{k}": v for i, mixer in enumerate(self.mixers) for k, v in mixer.aux_losses.items()}

    def encode(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: StackState | None = None,
        call: Callable[..., Any] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], StackState | None]:
        """The normed output of the last layer for every token, and the state after them if one was given.

        Without a state, `call(layer, x)` may run the layers, as `torch.utils.checkpoint.checkpoint` does.
        """
        check_ids(ids)
        check_mask("mask", mask, ids.shape[0], ids.shape[1])
        if state is not None and len(state.layers) != len(self.layers):
            raise ValueError(
                f"state has {len(state.layers)} layers, must have {len(self.layers)}, those of the model"
            )
        x = self.embedding(ids)
        after: list[State] = []
        for i, layer in enumerate(self.layers):
            if state is None:
                run = partial(layer, mask=mask)
                x = run(x) if call is None else call(run, x)
            else:
                x, reached = layer(x, mask=mask, state=state.layers[i])
                after.append(reached)
        return self.norm(x), None if state is None else StackState(tuple(after))

    def logits(self, hidden: Float[Tensor, "*b c"]) -> Float[Tensor, "*b v"]:
        """Logits over the vocabulary: hidden times the embedding, or the head of its own."""
        return F.linear(hidden, (self.embedding if self.head is None else self.head).weight)

    def example_inputs(self, *, batch: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(self.vocabulary, (batch, length), generator=generator)}

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; `load` builds the same model from them.

        Raises ValueError if the mixers are not all given by names and arguments that JSON can hold.
        """
        told = {"model": type(self).__name__, **self.config}
        try:
            text = json.dumps(told, indent=2)
        except TypeError as wrong:
            raise ValueError(
                "mixers holds what JSON cannot, must be names with plain arguments to save"
            ) from wrong
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        safetensors.torch.save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The model that `save` wrote; ValueError if it is of another class."""
        told = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        check_choice("model in config.json", told.pop("model", None), (cls.__name__,))
        model = cls(**told, dtype=dtype)
        safetensors.torch.load_model(model, str(Path(folder) / "model.safetensors"))
        return model.to(device)


def check_ids(ids: Tensor) -> None:
    """Tokens (batch, tokens), as an embedding takes them."""
    if ids.ndim != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}, must be (batch, tokens)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids has dtype {ids.dtype}, must be torch.int64 or torch.int32")


def cross_entropy(
    logits: Float[Tensor, "b n v"], labels: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """The mean over tokens whose label counts; -100 and masked tokens do not, and none at all is 0."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, must be {tuple(logits.shape[:2])}")
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORED)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().long(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def next_token_loss(
    logits: Float[Tensor, "b n v"], labels: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """`cross_entropy` of each label but the first, given the logits of the token before it."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, must be {tuple(logits.shape[:2])}")
    return cross_entropy(logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:])


def _is_named(choice: Any) -> bool:
    """A pair of a name and its arguments."""
    return (
        isinstance(choice, list | tuple)
        and len(choice) == 2
        and isinstance(choice[0], str)
        and isinstance(choice[1], Mapping)
    )
