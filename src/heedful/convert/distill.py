"""Training a converted model back: distillation from the model it was, and preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.convert.attention import ConvertedAttention
from heedful.registry import register

TRAINABLE = ("all", "converted")


def distillation_loss(
    student: Float[Tensor, "b *n v"], teacher: Float[Tensor, "b *n v"]
) -> Float[Tensor, ""]:
    """How far the student's probabilities are from the teacher's: KL(teacher || student).

    A sum over the tokens of a text, padding included, and a mean over texts, as published.
    Source: X-EcoMLA, arXiv 2503.11132.
    """
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def hidden_loss(
    student: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"], mask: Any = None
) -> Float[Tensor, ""]:
    """The same for models without logits: |student - teacher|^2 / |teacher|^2 over the real tokens. Ours."""
    weight = torch.ones_like(teacher[..., :1]) if mask is None else mask[..., None].to(teacher.dtype)
    return (weight * (student - teacher).square()).sum() / (weight * teacher.square()).sum()


def preference_loss(
    chosen: Float[Tensor, " b"],
    rejected: Float[Tensor, " b"],
    reference_chosen: Float[Tensor, " b"],
    reference_rejected: Float[Tensor, " b"],
    *,
    beta: float = 0.01,
) -> Float[Tensor, ""]:
    """Direct preference optimisation: mean of -log sigmoid(beta ((c - c_ref) - (r - r_ref))).

    c, r  log-probabilities of the chosen and the rejected answers, and those that the reference gives
    Source: DPO, arXiv 2305.18290; beta as in X-EcoMLA, arXiv 2503.11132.
    """
    gain = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * gain).mean()


@register("recover", kind="convert", paper="x-ecomla", tags=("distillation", "surgery"))
def recover(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 100,
    lr: float = 8e-5,
    warmup: float = 0.01,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    trainable: str = "all",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a converted model, in place, to give what its teacher gives.

        loss = kl_weight KL(teacher || student) + ce_weight CE + auxiliary losses of mixtures

    student    in the end in the mode (eval or train) it came in
    teacher    the model before the conversion or a larger one with the same vocabulary; it is not changed.
               None, with kl_weight=0: none is needed
    batches    what both take, one after the other and again; labels, where ce_weight asks for them, are in
               them or the input_ids themselves, padding left out
    steps      with AdamW, `lr` with a warmup over its share of the steps and then falling as a cosine
    trainable  "all": every parameter that requires a gradient; "converted": of converted attention alone
    progress   show it

    Models without logits learn their teacher's last hidden states (`hidden_loss`).
    Gives the loss ("loss") of every step. Raises ValueError where nothing can be trained, without batches,
    for an lr below 0, and where there is no teacher for kl_weight.
    Source: X-EcoMLA, arXiv 2503.11132, stage 1.
    """
    check_positive("steps", steps)
    check_choice("trainable", trainable, TRAINABLE)
    if not lr >= 0:
        raise ValueError(f"lr is {lr}, must be at least 0")
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    if teacher is None and kl_weight:
        raise ValueError(f"teacher is None, must be a model where kl_weight is not 0; it is {kl_weight}")
    if trainable == "all":
        parameters = [p for p in student.parameters() if p.requires_grad]
    else:
        converted = [m for m in student.modules() if isinstance(m, ConvertedAttention)]
        parameters = [p for m in converted for p in m.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"trainable is {trainable!r}, of which student has no parameter that may be trained")

    def loss(step: int) -> Tensor:
        batch = batches[step % len(batches)]
        return _distance(student, teacher, batch, kl_weight, ce_weight)

    with _modes(student, *([] if teacher is None else [teacher])):
        return train([{"params": parameters, "lr": lr}], loss, steps=steps, warmup=warmup, progress=progress)


def prefer(
    student: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    steps: int = 100,
    lr: float = 5e-7,
    warmup: float = 0.01,
    beta: float = 0.01,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a language model, in place, to prefer the first text of each pair (`preference_loss`).

    pairs  batches of chosen and of rejected texts; labels mark the answers, -100 elsewhere

    The rest is as in `recover`. Source: X-EcoMLA, arXiv 2503.11132, stage 2; its learning rate is not known,
    and the one here is ours.
    """
    check_positive("steps", steps)
    if not pairs:
        raise ValueError("pairs is empty, must hold at least one pair of batches")

    def loss(step: int) -> Tensor:
        pair = pairs[step % len(pairs)]
        own = [_log_probability(student, batch) for batch in pair]
        with torch.no_grad():
            theirs = [_log_probability(reference, batch) for batch in pair]
        return preference_loss(*own, *theirs, beta=beta)

    parameters = [p for p in student.parameters() if p.requires_grad]
    with _modes(student, reference):
        return train([{"params": parameters, "lr": lr}], loss, steps=steps, warmup=warmup, progress=progress)


def train(
    groups: list[dict[str, Any]],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    warmup: float = 0.01,
    progress: bool = True,
    also: Callable[[], dict[str, float]] = dict,
) -> list[dict[str, float]]:
    """AdamW on parameter groups: warmup, cosine, gradients cut at norm 1; the record of every step.

    groups   as an optimizer takes them; one with maximize=True climbs, and one with hold=x keeps its rate for
             that share of the steps and then falls in a line
    loss_of  the loss of a step, by its number
    also     what else a record holds, asked after each step
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    ramp = max(1, math.ceil(warmup * steps))

    def share(step: int) -> float:
        if step < ramp:
            return (step + 1) / ramp
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))

    def held(hold: float) -> Callable[[int], float]:
        return lambda step: min(1.0, (steps - step) / (steps * (1 - hold)) if hold < 1 else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [held(group["hold"]) if "hold" in group else share for group in groups]
    )
    down = [p for group in groups if not group.get("maximize") for p in group["params"]]
    history = []
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}, loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("training", total=steps, loss=math.nan)
        for step in range(steps):
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(down, 1.0)
            optimizer.step()
            schedule.step()
            history.append({"loss": loss.item(), **also()})
            bar.update(task, advance=1, loss=loss.item())
    return history


def _distance(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Mapping[str, Any], kl: float, ce: float
) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    out = student(**given)
    if ce and "logits" not in out:
        raise ValueError(f"ce_weight is {ce}, must be 0: student has no logits")
    loss = out[0].new_zeros(())
    if teacher is not None and kl:
        with torch.no_grad():
            wanted = teacher(**given)
        if "logits" in out:
            loss = kl * distillation_loss(out["logits"], wanted["logits"])
        else:
            states = out["last_hidden_state"], wanted["last_hidden_state"]
            loss = kl * hidden_loss(*states, given.get("attention_mask"))
    if ce:
        loss = loss + ce * cross_entropy(out["logits"], batch)
    return loss + sum(auxiliary(student))


def cross_entropy(logits: Float[Tensor, "b n v"], batch: Mapping[str, Any]) -> Float[Tensor, ""]:
    """Of the next tokens: the batch's labels, or its input_ids without padding."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), _labels(batch)[:, 1:].flatten())


def auxiliary(model: nn.Module) -> Iterator[Tensor]:
    """The auxiliary losses of all modules."""
    for module in model.modules():
        losses = getattr(module, "aux_losses", None)
        if isinstance(losses, dict):
            yield from losses.values()


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def _log_probability(model: PreTrainedModel, batch: Mapping[str, Any]) -> Float[Tensor, " b"]:
    labels = _labels(batch)[:, 1:]
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given).logits[:, :-1].log_softmax(-1)
    each = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (each * (labels != -100)).sum(-1)


@contextmanager
def _modes(student: nn.Module, *teachers: nn.Module) -> Iterator[None]:
    """The student trains and teachers do not; all come out as they went in."""
    before = [(model, model.training) for model in (student, *teachers)]
    for teacher in teachers:
        teacher.eval()
    student.train()
    try:
        yield
    finally:
        for model, mode in before:
            model.train(mode)
