"""`heedful compare --task cache`: what cache policies lose and save, on a small Llama and real text."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.bench import cache_model
from heedful.bench.cache_model import ASK, DIGITS, Settings
from heedful.bench.progress import Silent, Watch
from heedful.bench.tasks import Text, make_tasks
from heedful.checks import check_positive
from heedful.hf import NAME
from heedful.hf.cache_name import CACHE

FULL = "full cache"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
BUDGETS = (32, 64, 128, 256)
PROMPT = 3 / 4  # of the window; the rest is read token by token
ROWS = 24  # windows of text, and of each depth
LONG = 16  # decoding is timed behind a prompt so many windows long
TRAINING, RUN = 300.0, 5.0  # seconds expected of the training, and of each policy at each budget


@dataclass(frozen=True)
class Result:
    """One policy at one budget.

    bits         bits per byte of the last quarter of held-out windows, read token by token behind the rest
    retrieval    by depth, the share of planted keys that came out whole
    held         bytes of the cache of one sequence at the end of a window
    milliseconds a decoded token behind a prompt of `prompt` tokens, one sequence
    seconds      that this prompt took
    """

    policy: str
    budget: int | None
    bits: float
    retrieval: dict[float, float]
    held: int
    milliseconds: float
    prompt: int
    seconds: float

    @property
    def label(self) -> str:
        return self.policy if self.budget is None else f"{self.policy} {self.budget}"

    @property
    def found(self) -> float:
        """The mean over depths of the keys found."""
        return statistics.fmean(self.retrieval.values())


@dataclass
class Comparison:
    """All figures, and what they were measured on."""

    about: str
    machine: str
    settings: Settings
    from_cache: bool
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    def write_json(self, path: Path) -> None:
        told = asdict(self) | {
            "results": [asdict(r) | {"label": r.label, "found": r.found} for r in self.results]
        }
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """A comparison that was checked at the door."""

    text: Text
    policies: list[str]
    budgets: tuple[int, ...]
    settings: Settings
    device: torch.device


def plan(
    *,
    settings: Settings | None = None,
    policies: str | None = None,
    budgets: Sequence[int] = BUDGETS,
    data: Path | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> Plan:
    """Check everything that can be checked before the start.

    settings: of the model. policies: names of a comma-separated list; None: all. data: a text file.
    steps: of the training, in place of the settings' own.
    Raises ValueError on unknown names, budgets below 8 tokens, and unfit data.
    """
    from heedful import cache

    known = cache.names()
    chosen = _registered() if policies is None else [name.strip() for name in policies.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"no cache policy is called {name!r}; there are {', '.join(known)}")
    for budget in budgets:
        check_positive("budgets", budget)
        if budget < 8:
            raise ValueError(f"budgets has {budget}, must be at least 8 tokens")
    settings = settings or Settings()
    if steps is not None:
        check_positive("steps", steps)
        settings = replace(settings, steps=steps)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task = make_tasks("text", data)[0]
    assert isinstance(task, Text)
    return Plan(task, chosen, tuple(budgets), settings, where)


def compare(plan: Plan, watch: Watch | None = None) -> Comparison:
    """Train or find the model, then measure each policy at each budget. Ctrl-C keeps what is finished."""
    watch = Silent() if watch is None else watch
    runs = len(plan.policies) * len(plan.budgets) + 1
    watch.begin(RUN * runs + TRAINING)
    found = Comparison(_about(plan), _machine(plan.device), plan.settings, from_cache=False)
    try:
        watch.start("training the model", plan.settings.steps)
        model, found.from_cache = cache_model.lookup(plan.text, plan.settings, plan.device, watch.step)
        model.set_attn_implementation(NAME)
        watch.finish(TRAINING, "the trained model was found" if found.from_cache else "the model is trained")
        for result in measure(model, plan):
            found.results.append(result)
            watch.finish(RUN, _line(result))
    except KeyboardInterrupt:
        found.interrupted = True
    finally:
        watch.end()
    return found


def measure(model: Any, plan: Plan) -> Iterator[Result]:
    """The full cache, then each policy at each budget."""
    yield _measured(model, plan, FULL, None)
    for policy in plan.policies:
        for budget in plan.budgets:
            yield _measured(model, plan, policy, budget)


def _measured(model: Any, plan: Plan, policy: str, budget: int | None) -> Result:
    from transformers import DynamicCache

    from heedful.cache import create

    def made() -> Any:
        return DynamicCache(config=model.config) if budget is None else create(policy, model, budget=budget)

    with torch.no_grad():
        bits, held = _bits(model, plan, made)
        retrieval = {depth: _found(model, plan, made, depth) for depth in DEPTHS}
        prompt, seconds, milliseconds = _decoding(model, plan, made)
    return Result(policy, budget, bits, retrieval, held, milliseconds, prompt, seconds)


# -- the three measurements -----------------------------------------------------------------------


def _bits(model: Any, plan: Plan, made: Any) -> tuple[float, int]:
    length = plan.settings.length
    held = plan.text.parts[1]
    fit = len(held) // length
    chosen = torch.linspace(0, fit - 1, min(fit, ROWS)).long()
    window = held[chosen[:, None] * length + torch.arange(length)].to(plan.device)
    cache, first = made(), int(length * PROMPT)
    logits = [model(window[:, :first], **{CACHE: cache}, logits_to_keep=1).logits]
    logits += [model(window[:, i : i + 1], **{CACHE: cache}).logits for i in range(first, length - 1)]
    loss = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1).float(), window[:, first:].flatten())
    return float(loss) / math.log(2), _nbytes(cache) // len(window)


def _found(model: Any, plan: Plan, made: Any, depth: float) -> float:
    """The share of keys that come out whole when the prompt asks for them."""
    generator = torch.Generator().manual_seed(int(depth * 100))
    held, length = plan.text.parts[1], plan.settings.length - DIGITS
    start = torch.randint(len(held) - length, (ROWS, 1), generator=generator)
    window = held[start + torch.arange(length)]
    keys = [cache_model.draw_key(generator) for _ in range(ROWS)]
    for row, key in zip(window, keys, strict=True):
        cache_model.plant(row, key, int(depth * (length - 3 * len(ASK) - DIGITS)))
        row[-len(ASK) :] = torch.tensor(list(ASK))
    cache, tokens, said = made(), window.to(plan.device), []
    for _ in range(DIGITS):
        tokens = model(tokens, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
        said.append(tokens.cpu())
    wanted = torch.tensor([list(key) for key in keys])
    return float((torch.cat(said, 1) == wanted).all(1).float().mean())


def _decoding(model: Any, plan: Plan, made: Any) -> tuple[int, float, float]:
    """Seconds of a long prompt, the better of two, and milliseconds a token behind it, the median of runs."""
    prompt = plan.text.parts[1][None, : LONG * plan.settings.length].to(plan.device)
    prompts, tokens = [], []
    for _ in range(2):
        cache, start = made(), time.perf_counter()
        model(prompt, **{CACHE: cache}, logits_to_keep=1).logits.cpu()
        prompts.append(time.perf_counter() - start)
    token = prompt[:, -1:]
    for run in range(6):
        start = time.perf_counter()
        for _ in range(10):
            token = model(token, **{CACHE: cache}).logits.argmax(-1)
        token.cpu()
        if run:  # the first one warms up
            tokens.append((time.perf_counter() - start) / 10)
    return prompt.shape[1], min(prompts), 1000 * statistics.median(tokens)


def _nbytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    tensors: list[Tensor] = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors)


# -- words ----------------------------------------------------------------------------------------


def _registered() -> list[str]:
    from heedful.cache import names
    from heedful.registry import index

    return [name for name in names() if name in index() and index()[name].kind == "cache"]


def _about(plan: Plan) -> str:
    s = plan.settings
    return (
        f"{plan.text.source}; a Llama of {s.layers} layers, {s.dim} channels, {s.heads} heads on "
        f"{s.kv_heads} KV heads, trained {s.steps} steps on windows of {s.length} bytes"
    )


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def _line(result: Result) -> str:
    return (
        f"{result.label}  {result.bits:.3f} bits per byte, keys found {result.found:.0%}, "
        f"{result.held / 1024:.0f} KiB, {result.milliseconds:.1f} ms a token, prompt {result.seconds:.2f} s"
    )
