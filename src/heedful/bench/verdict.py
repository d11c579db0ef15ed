"""From figures to an answer: which mixers nothing beats, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence

from heedful.bench.results import Result
from heedful.bench.tasks import Task


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """For each point whether no other is at least as high everywhere and higher somewhere."""
    return [
        not any(all(b >= a for a, b in zip(p, q, strict=True)) and q != p for q in points) for p in points
    ]


def judge(results: Sequence[Result], task: Task) -> str:
    """Mark the Pareto-optimal and the recommended of one task's results; the advice in a sentence."""
    if not results:
        return f"On {task.name}: nothing was measured."
    sign = 1 if task.measure.higher_is_better else -1
    for result, free in zip(
        results, pareto([(sign * r.quality, r.throughput) for r in results]), strict=True
    ):
        result.pareto, result.recommended = free, False
    baseline = next((r for r in results if r.baseline), None)
    if baseline is None:
        return f"On {task.name}: no advice, because dense attention has no figures to compare with."
    if task.measure.better(task.goal, baseline.quality):
        return (
            f"On {task.name}: no advice, because {baseline.steps} steps are too few to judge any mixer: "
            f"dense attention itself reached {task.measure.name} {task.measure.text(baseline.quality)} where "
            f"{task.measure.text(task.goal)} shows that the task is learned; "
            "give more with --budget or --preset full."
        )
    best = max(results, key=lambda r: sign * r.quality)
    close = max(task.measure.tolerance, best.quality_spread)
    good = [r for r in results if sign * (best.quality - r.quality) <= close]
    chosen = max(good, key=lambda r: r.throughput)
    chosen.recommended = True
    if len(results) == 1:
        return f"On {task.name}: dense attention learns the task; nothing else was measured."
    return _sentence(chosen, best, baseline, task)


def _sentence(chosen: Result, best: Result, baseline: Result, task: Task) -> str:
    text = task.measure.text
    quality = f"{task.measure.name} {text(chosen.quality)}"
    if text(best.quality) != text(chosen.quality):
        quality += f" (best: {best.label}, {text(best.quality)})"
    if chosen is baseline:
        reason = "no mixer of like quality trains faster at this size"
    else:
        reason = f"trains {_speed(chosen.throughput / baseline.throughput)} dense attention"
        if chosen.peak_memory_mib and baseline.peak_memory_mib:
            reason += f" in {chosen.peak_memory_mib / baseline.peak_memory_mib:.2g} times its memory"
    return f"On {task.name}: take {chosen.label}, {quality}, {reason}{_at_length(chosen, baseline)}."


def _at_length(chosen: Result, baseline: Result) -> str:
    """How chosen and baseline compare at the largest size that both were measured at."""
    dense = {p.tokens: p.milliseconds for p in baseline.cost_curve}
    common = [p for p in chosen.cost_curve if p.tokens in dense]
    if chosen is baseline or not common:
        return ""
    last = max(common, key=lambda p: p.tokens)
    speed = _speed(dense[last.tokens] / last.milliseconds)
    return f"; at {last.tokens} tokens the mixer alone is {speed} dense attention"


def _speed(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "about as fast as"
    factor = max(ratio, 1 / ratio)
    text = f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"
    return f"{text} times as fast as" if ratio > 1 else f"{text} times slower than"
