"""One input of a model under inspection: what it is given, and what its tokens are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Sample:
    """A text or an image as the model takes it, in a batch of one.

    labels   a name for every token, or patch
    special  True at tokens that stand for no part of the input, such as [CLS] and [SEP]
    ids      token ids; None for images
    grid     (height, width) in patches, of images; the special tokens come before them
    picture  of images, a data: address
    reads    the tokens of the last layer that the output is made of; None: the last one behind a causal mask,
             else all
    """

    title: str
    inputs: Mapping[str, Any]
    labels: list[str]
    special: Bool[Tensor, " m"]
    ids: Int[Tensor, " m"] | None = None
    grid: tuple[int, int] | None = None
    picture: str | None = None
    reads: slice | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prefix(self) -> int:
        """How many tokens come before the patches of an image."""
        return int(self.special.sum()) if self.grid else 0


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, samples for it, and how it is called in the report."""

    model: nn.Module
    name: str
    samples: list[Sample]

    def run(self, sample: Sample) -> Any:
        """The model's output for a sample."""
        return self._call(sample.inputs)

    def outcomes(self) -> tuple[bool, Float[Tensor, "rows c"]]:
        """What of the model's output is compared when a head falls silent: whether it is logits, and rows.

        Logits of all tokens or of the images; else the mean of the last hidden state over the tokens.
        """
        batch = _joined([sample.inputs for sample in self.samples])
        if batch is not None:
            return _outcome(self._call(batch), batch.get("attention_mask"))
        found = [_outcome(self.run(sample), None) for sample in self.samples]
        return found[0][0], torch.cat([rows for _, rows in found])

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        rest = dict(inputs)
        x = rest.pop("x", None)
        return self.model(**rest) if x is None else self.model(x, **rest)


def _joined(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | None:
    """One batch of all samples, texts padded on the right behind a mask; None where that may not serve."""
    first = inputs[0]
    if "input_ids" not in first:
        images = set(first) in ({"x"}, {"pixel_values"})
        if not images or any(
            next(iter(i.values())).shape != next(iter(first.values())).shape for i in inputs
        ):
            return None
        return {key: torch.cat([i[key] for i in inputs]) for key in first}
    if not {"attention_mask", "input_ids"} <= set(first) <= {"attention_mask", "input_ids", "token_type_ids"}:
        return None
    longest = max(i["input_ids"].shape[1] for i in inputs)
    return {key: torch.cat([F.pad(i[key], (0, longest - i[key].shape[1])) for i in inputs]) for key in first}


def _outcome(output: Any, mask: Tensor | None) -> tuple[bool, Tensor]:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is not None and logits.ndim == 2:
        return True, logits
    if logits is not None and not isinstance(output, Tensor):
        return True, logits[mask.bool()] if mask is not None else logits.flatten(0, 1)
    hidden = output if isinstance(output, Tensor) else output[0]
    if hidden.ndim == 4:
        return False, hidden.flatten(2).mean(-1)
    weight = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden)
    return False, (hidden * weight).sum(1) / weight.sum(1)


def of_ids(
    ids: Int[Tensor, "1 m"], inputs: Mapping[str, Any], tokenizer: Any = None, *, title: str | None = None
) -> Sample:
    """A sample from token ids; without a tokenizer, tokens are called by their numbers."""
    row = ids[0].cpu()
    if tokenizer is None:
        special = torch.zeros(len(row), dtype=torch.bool)
        return Sample(title or f"{len(row)} tokens", inputs, [str(int(i)) for i in row], special, row)
    special = torch.isin(row, torch.tensor(tokenizer.all_special_ids or [-1]))
    labels = [_readable(tokenizer, int(i)) for i in row]
    title = title or tokenizer.decode(row, skip_special_tokens=True)
    return Sample(title, inputs, labels, special, row)


def _readable(tokenizer: Any, token: int) -> str:
    """A token as one reads it; a leading space of byte-pair tokenizers goes."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece.startswith("##") or token in tokenizer.all_special_ids:
        return piece
    return tokenizer.decode([token]).strip() or repr(tokenizer.decode([token]))[1:-1] or piece
