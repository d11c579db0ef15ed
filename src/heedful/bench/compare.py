"""Train the same small network with each mixer, measure, and say which to take."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heedful.bench import choices as choose
from heedful.bench.choices import Choice
from heedful.bench.influence import influence
from heedful.bench.measure import cost, flops, step_memory
from heedful.bench.presets import LEARNING_RATE, MEASURE_SECONDS, PRESETS, Preset
from heedful.bench.progress import Silent, Watch
from heedful.bench.results import Comparison, Missing, Result
from heedful.bench.tasks import Images, Task, make_tasks
from heedful.bench.train import train
from heedful.bench.verdict import judge
from heedful.checks import check_choice, check_positive
from heedful.models.count import parameters

SLOW = 20.0  # seconds a point of a cost curve may take before larger sizes are left out


@dataclass(frozen=True)
class Plan:
    """A comparison that was checked at the door and can start."""

    tasks: list[Task]
    runs: list[tuple[Task, Choice]]  # the baseline is the first of each task
    refused: list[Missing]
    preset_name: str
    preset: Preset
    device: torch.device
    deadline: float | None  # seconds of wall clock

    @property
    def families(self) -> list[tuple[str, Choice]]:
        """The cost curves to draw: "sequence" or "image", and the mixer."""
        pairs = [("image" if isinstance(task, Images) else "sequence", choice) for task, choice in self.runs]
        return list({(family, choice.label): (family, choice) for family, choice in pairs}.values())

    def run_seconds(self, task: Task) -> float:
        """About how long a mixer takes on the task, on two cores."""
        return self.preset.seconds(task) + MEASURE_SECONDS

    def sizes(self, family: str) -> list[tuple[int, int | None]]:
        """(tokens, side) of the points of a cost curve."""
        if family == "sequence":
            return [(n, None) for n in self.preset.lengths]
        return [(side * side, side) for side in self.preset.sides]


def plan(
    *,
    task: str = "all",
    mixers: str | None = None,
    data: Path | None = None,
    preset: str = "quick",
    seeds: int | None = None,
    steps: int | None = None,
    depth: int | None = None,
    budget: float | None = None,
    device: str | None = None,
) -> Plan:
    """Check everything that can be checked before the start.

    task: a name, or all; recall takes numbers, "recall:length=512,pairs=8".
    mixers: names with arguments, "dense,faster-neighborhood-attention:window=7"; None: a small selection.
    seeds, steps, depth: trainings of each mixer, their steps, blocks of the networks; None: the preset's.
    budget: minutes of wall clock; scales the training steps. What has not begun by then is not run.
    Raises ValueError on unknown names, unfit data, and if no mixer can do any of the tasks.
    """
    check_choice("preset", preset, tuple(PRESETS))
    size = PRESETS[preset]
    if seeds is not None:
        check_positive("seeds", seeds)
        size = replace(size, seeds=seeds)
    if steps is not None:
        check_positive("steps", steps)
        size = replace(size, steps=dict.fromkeys(size.steps, steps))
    if depth is not None:
        check_positive("depth", depth)
        size = replace(size, depth=depth)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget is {budget}, must be a number of minutes above 0")
    chosen = choose.default() if mixers is None else choose.parse(mixers)
    where = _device(device)
    tasks = make_tasks(task, data)
    baseline = choose.parse(choose.BASELINE)[0]
    runs, refused = [], []
    for each in tasks:
        runs.append((each, baseline))
        for choice in chosen:
            if choice.is_baseline:
                continue
            reason = choice.refusal(each) or _unfit(choice, each, size)
            if reason is None:
                runs.append((each, choice))
            else:
                refused.append(Missing(choice.label, each.name, reason))
    for choice in chosen:
        reasons = [missing.reason for missing in refused if missing.label == choice.label]
        if mixers is not None and len(reasons) == len(tasks):
            raise ValueError("; ".join(reasons))
    made = Plan(tasks, runs, refused, preset, size, where, None if budget is None else 60 * budget)
    if budget is not None:
        points = len(runs) + sum(len(made.sizes(family)) for family, _ in made.families)
        made = replace(made, preset=size.within(budget, [each for each, _ in runs], points))
    return made


def compare(plan: Plan, watch: Watch | None = None) -> Comparison:
    """Carry out the plan. An interrupt (Ctrl-C) ends it early and keeps what is finished."""
    watch = Silent() if watch is None else watch
    found = Comparison(plan.tasks, plan.preset_name, _machine(plan.device), refused=plan.refused)
    end = None if plan.deadline is None else time.monotonic() + plan.deadline
    watch.begin(
        sum(plan.run_seconds(task) for task, _ in plan.runs)
        + sum(len(plan.sizes(family)) * MEASURE_SECONDS for family, _ in plan.families)
    )
    try:
        _train_all(plan, found, watch, end)
        _cost_curves(plan, found, watch, end)
    except KeyboardInterrupt:
        found.interrupted = True
    finally:
        watch.end()
    done = {(r.label, r.task) for r in found.results}
    done |= {(m.label, m.task) for m in [*found.failed, *found.not_run]}
    for task, choice in plan.runs:
        if (choice.label, task.name) not in done:
            found.not_run.append(Missing(choice.label, task.name, "interrupted"))
    found.advice = {task.name: judge(found.of(task), task) for task in plan.tasks}
    return found


def _train_all(plan: Plan, found: Comparison, watch: Watch, end: float | None) -> None:
    for task, choice in plan.runs:
        if end is not None and time.monotonic() > end:
            found.not_run.append(Missing(choice.label, task.name, "the budget was used up"))
            continue
        try:
            result = _measure(plan, task, choice, found, watch)
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            # One mixer that fails is a finding; the others go on.
            found.failed.append(Missing(choice.label, task.name, str(error).split("\n")[0]))
            watch.finish(plan.run_seconds(task), f"{task.name}  {choice.label}  failed: {error}")
            continue
        found.results.append(result)
        watch.finish(plan.run_seconds(task), _line(result, task))


def _measure(plan: Plan, task: Task, choice: Choice, found: Comparison, watch: Watch) -> Result:
    preset, steps = plan.preset, plan.preset.steps[task.name]
    trained = []
    for seed in range(preset.seeds):
        watch.start(f"{task.name} · {choice.label} · seed {seed + 1} of {preset.seeds}", steps)
        torch.manual_seed(seed)
        model = choice.host(task, dim=preset.dim, depth=preset.depth).to(plan.device)
        rate = LEARNING_RATE[task.name]
        trained.append(
            train(
                model,
                task,
                steps=steps,
                learning_rate=rate,
                seed=seed,
                device=plan.device,
                on_step=watch.step,
            )
        )
    found.influences[choice.label, task.name] = influence(choice, model, task, plan.device)
    inputs = next(iter(task.held_out()))[0].to(plan.device)
    units = len(inputs) if isinstance(task, Images) else inputs.numel()
    memory = step_memory(choice, task, dim=preset.dim, depth=preset.depth, device=str(plan.device))
    qualities = [t.quality for t in trained]
    arguments = choice.arguments(
        dim=preset.dim,
        causal=not isinstance(task, Images),
        side=task.side if isinstance(task, Images) else None,
    )
    return Result(
        mixer=choice.entry.name,
        task=task.name,
        label=choice.label,
        kind=choice.entry.kind,
        baseline=choice.is_baseline,
        arguments=arguments,
        code=choice.code(arguments),
        quality=statistics.fmean(qualities),
        quality_name=task.measure.name,
        higher_is_better=task.measure.higher_is_better,
        quality_spread=statistics.stdev(qualities) if len(qualities) > 1 else 0.0,
        quality_seeds=qualities,
        goal=task.goal,
        throughput=statistics.median(t.throughput for t in trained),
        throughput_unit=f"{task.unit}/s",
        peak_memory_mib=None if isinstance(memory, str) else memory,
        parameters=parameters(model),
        flops_per_unit=flops(model, inputs) / units,
        flops_unit=f"FLOPs/{task.unit[:-1]}",
        steps=steps,
        device=str(plan.device),
        threads=torch.get_num_threads(),
    )


def _cost_curves(plan: Plan, found: Comparison, watch: Watch, end: float | None) -> None:
    for family, choice in plan.families:
        curve = []
        for tokens, side in plan.sizes(family):
            if end is not None and time.monotonic() > end:
                return
            watch.start(f"cost · {choice.label} · {tokens} tokens", 0)
            begun = time.monotonic()
            point = cost(choice, dim=plan.preset.dim, tokens=tokens, side=side, device=str(plan.device))
            watch.finish(MEASURE_SECONDS)
            if not isinstance(point, str):
                curve.append(point)
            if isinstance(point, str) or time.monotonic() - begun > SLOW:
                break
        for result in found.results:
            if result.label == choice.label and (result.task == "images") == (family == "image"):
                result.cost_curve = curve


def _unfit(choice: Choice, task: Task, preset: Preset) -> str | None:
    """Why the mixer cannot be built at this task's size; None if it can."""
    try:
        choice.host(task, dim=preset.dim, depth=1)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{choice.label} does not fit the task {task.name}: {error}".split("\n")[0]
    return None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}".split("\n")[0]) from None
    return device


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def _line(result: Result, task: Task) -> str:
    spread = f" ± {result.quality_spread:.3f}" if len(result.quality_seeds) > 1 else ""
    return (
        f"{task.name}  {result.label}  {task.measure.name} {task.measure.text(result.quality)}{spread}  "
        f"{result.throughput:,.0f} {result.throughput_unit}"
    )
