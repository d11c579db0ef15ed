"""The small Llama that cache policies are compared on: trained once, on English with planted keys.

A key is planted as the line "key~483": later lines that begin with "key~" go on with the same digits, so
that a model learns to look them up. Lines stand anywhere: at places on a grid, distances alone would tell
where to look. Half of the windows hold two lines alone, the others several. Windows begin short, where
looking up is learned soonest, and grow.
The trained model is kept in a folder named by all its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.bench.tasks import Text
from heedful.torchvision_shim import mend_torchvision

mend_torchvision()

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

ASK, DIGITS = b"\nkey~", 3
OnStep = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class Settings:
    """All that the trained weights depend on, beside the text."""

    dim: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    length: int = 512
    steps: int = 1500
    batch_size: int = 8
    learning_rate: float = 3e-3
    short: int = 64  # length of the windows in the first quarter of the steps; in the last third it is full
    planted: int = 6  # lines with the key in every other window, as far as they fill no more than half of it
    weight: float = 8.0  # of the digits that can be looked up, in the loss
    seed: int = 0
    recipe: int = 3  # of what is not told by these numbers; a change of it makes trained models anew

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.dim,
            intermediate_size=3 * self.dim,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


def lookup(
    text: Text, settings: Settings, device: torch.device, on_step: OnStep
) -> tuple[LlamaForCausalLM, bool]:
    """The trained model, and whether it came from the cache folder."""
    told = json.dumps(dataclasses.asdict(settings), sort_keys=True).encode()
    folder = cache_folder() / f"llama-{hashlib.sha256(told + text.data).hexdigest()[:16]}"
    if (folder / "config.json").exists():
        with _quiet():
            model = LlamaForCausalLM.from_pretrained(folder)
        model.to(device)  # type: ignore[arg-type]
        return model.eval(), True
    model = trained(text, settings, device, on_step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:  # the folder is there whole or not at all
        with _quiet():
            model.save_pretrained(Path(made) / "model")
        if not folder.exists():
            shutil.move(Path(made) / "model", folder)
    return model, False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which would run into heedful's own."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """Where trained models are kept: $HEEDFUL_CACHE, or heedful in the user's cache folder."""
    if told := os.environ.get("HEEDFUL_CACHE"):
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heedful"


def trained(text: Text, settings: Settings, device: torch.device, on_step: OnStep) -> LlamaForCausalLM:
    """A model trained from the start; AdamW, a warm-up of a tenth of the steps, then down to zero."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(settings.config())
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, max(0.02, (settings.steps - i) / (settings.steps - warm + 1))),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for step in range(settings.steps):
        grown = min(1.0, max(0.0, step / settings.steps - 1 / 4) / (2 / 3 - 1 / 4))
        length = int(settings.short * (settings.length / settings.short) ** grown)
        window, weight = (x.to(device) for x in _windows(text, settings, length, generator))
        logits = model(window[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        loss = (losses * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    return model.eval()


def _windows(
    text: Text, settings: Settings, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training windows (b, length + 1), the key planted in each, and weights of the loss."""
    data = text.parts[0]
    rows = settings.batch_size * settings.length // length  # as many bytes at every length
    start = torch.randint(len(data) - length, (rows, 1), generator=generator)
    window = data[start + torch.arange(length + 1)]
    weight = torch.ones_like(window, dtype=torch.float32)
    line = len(ASK) + DIGITS + 1
    for number, (row, weights) in enumerate(zip(window, weight, strict=True)):
        key = draw_key(generator)
        count = 2 if number % 2 else min(settings.planted, length // (2 * line))
        room = length + 1 - count * line
        places = torch.randint(room + 1, (count,), generator=generator).sort().values
        if number % 2:  # asked for at the end, so that far distances are frequent
            places[-1] = room
        for i, place in enumerate((places + torch.arange(count) * line).tolist()):
            plant(row, key, place)
            if i:
                weights[place + len(ASK) : place + len(ASK) + DIGITS] = settings.weight
    return window, weight


def draw_key(generator: torch.Generator) -> bytes:
    """Different random digits."""
    return bytes((torch.randperm(10, generator=generator)[:DIGITS] + ord("0")).tolist())


def plant(row: Tensor, key: bytes, place: int) -> None:
    """Write the line with the key over the bytes from `place` on."""
    line = ASK + key + b"\n"
    row[place : place + len(line)] = torch.tensor(list(line))
