"""What was found, in sentences that need no knowledge of attention."""

from __future__ import annotations

from collections import Counter

import numpy as np

from heedful.inspect.explanation_section import plain as reasons
from heedful.inspect.findings import Findings, Head
from heedful.inspect.head_profile import Habit


def name_of(head: Head) -> str:
    """Layers and heads are counted from 1 in everything a person reads."""
    return f"layer {head.layer + 1}, head {head.head + 1}"


def percent(x: float) -> str:
    """A share, with a digit more where it is small."""
    return f"{100 * x:.0f} %" if x >= 0.0995 or x == 0 else f"{100 * x:.1f} %"


def loss(found: Findings, x: float) -> str:
    """What a number of importance says."""
    if found.logits:
        return f"{x:.3g} nats between the predictions with and without"
    angle = np.degrees(np.arccos(np.clip(1 - x, -1, 1)))
    return f"the output turns by {angle:.1f}°"


def plain_words(found: Findings) -> list[tuple[str, str]]:
    """(heading, sentence) pairs: what the heads do, what matters, where attention rests, how far it looks."""
    return [
        ("What the heads do", _habits(found)),
        ("What matters", _importance(found)),
        ("Where attention rests", _sinks(found)),
        ("How far it looks", _distance(found)),
        ("How sharp it is", _entropy(found)),
        *([("Loud channels", _peaks(found))] if found.peaks else []),
        *([("What it rests on", reasons(found.explanations))] if found.explanations.samples else []),
    ]


def _habits(found: Findings) -> str:
    count = Counter(h.habit for h in found.heads)
    (first, n), *rest = count.most_common()
    text = f"The model has {len(found.heads)} heads in {len(found.layers)} layers. {_many(n, first)}"
    for habit, m in rest:
        if m > 1:
            text += f"; {_many(m, habit)}"
    text += "."
    singles = [
        f"{name_of(h)} {h.habit.words}" for h in found.heads if count[h.habit] == 1 and h.habit is not first
    ]
    if singles:
        text += " Some are alone in what they do: " + "; ".join(singles) + "."
    return text


def _many(count: int, habit: Habit) -> str:
    """'7 heads look at ...' of 'looks at ...'."""
    if count == 1:
        return f"one {habit.words}"
    verb, rest = habit.words.split(" ", 1)
    return f"{count} {verb.removesuffix('s')} {rest}"


def _importance(found: Findings) -> str:
    order = sorted(found.heads, key=lambda h: -h.importance)
    total = sum(max(0.0, h.importance) for h in found.heads)
    if total == 0:
        return "No head by itself changes the output."
    top = order[0]
    count, so_far = 0, 0.0
    for head in order:
        count, so_far = count + 1, so_far + max(0.0, head.importance)
        if so_far >= total / 2:
            break
    by_layer = {layer: sum(h.importance for h in found.of_layer(layer)) for layer in found.layers}
    heaviest = max(by_layer, key=lambda layer: by_layer[layer])
    text = (
        f"Each head was silenced in turn. The one that matters most is {name_of(top)}: without it "
        f"{loss(found, top.importance)}. {count} of {len(order)} heads make up half of all that single heads "
        f"change, and layer {heaviest + 1} matters most of the layers. "
    )
    half = len(order) // 2
    return text + (
        f"With the {half} least important heads silenced all at once, {loss(found, found.least_half)}."
    )


def _sinks(found: Findings) -> str:
    special = [
        sum(h.features["special"] for h in found.of_layer(layer)) / len(found.of_layer(layer))
        for layer in found.layers
    ]
    most = int(np.argmax(special))
    what = "the class or register tokens" if found.image else "special tokens or the first token"
    view = found.views[0]
    text = ""
    if not found.image or view.sample.prefix:
        text = (
            f"On average {percent(float(np.mean(special)))} of the attention goes to {what}; most, "
            f"{percent(special[most])}, in layer {found.layers[most] + 1}. "
        )
    layer, token = np.unravel_index(int(view.received.argmax()), view.received.shape)
    label, share = f"“{view.sample.labels[token]}”", float(view.received[layer, token])
    if found.image and token >= view.sample.prefix:
        label = "the patch in row {}, column {}".format(*view.sample.labels[token].split(","))
    text += (
        f"In the first example the strongest sink is {label} in layer {found.layers[layer] + 1}: "
        f"every {'patch' if found.image else 'token'} gives it {percent(share)} of its attention on average. "
    )
    if np.max(special) > 0.4:
        text += "Heads commonly rest there when they have nothing to add."
    return text


def _distance(found: Findings) -> str:
    means = {
        layer: sum(h.features["distance"] for h in found.of_layer(layer)) / len(found.of_layer(layer))
        for layer in found.layers
    }
    unit = "hops on the grid of patches" if found.image else "tokens"
    low, high = min(means, key=lambda k: means[k]), max(means, key=lambda k: means[k])
    near = min(found.heads, key=lambda h: h.features["distance"])
    far = max(found.heads, key=lambda h: h.features["distance"])
    return (
        f"Layer {low + 1} looks nearest ({means[low]:.1f} {unit} on average) and layer {high + 1} furthest "
        f"({means[high]:.1f}). Of the heads {name_of(near)} looks nearest ({near.features['distance']:.1f}), "
        f"{name_of(far)} furthest ({far.features['distance']:.1f})."
    )


def _entropy(found: Findings) -> str:
    sharp = min(found.heads, key=lambda h: h.features["entropy"])
    broad = max(found.heads, key=lambda h: h.features["entropy"])
    pointed = sum(h.features["entropy"] < 0.3 for h in found.heads)
    return (
        f"On a scale from 0 (all on one token) to 1 (evenly on all), the sharpest is {name_of(sharp)} at "
        f"{sharp.features['entropy']:.2f}, the broadest {name_of(broad)} at {broad.features['entropy']:.2f}; "
        f"{pointed} of {len(found.heads)} heads are below 0.3."
    )


def _peaks(found: Findings) -> str:
    peak = max(found.peaks, key=lambda p: p.value / max(p.median, 1e-12))
    times = peak.value / max(peak.median, 1e-12)
    text = (
        f"The largest activation is {peak.value:.1f}, at “{peak.token}” in channel {peak.channel} before "
        f"layer {peak.layer + 1}: {times:,.0f} times the median. "
    )
    if peak.value > 100 and times > 1000:
        return text + "That is what is called a massive activation; it marks an attention sink."
    return text + "That is below what is called a massive activation (above 100, and 1000 times the median)."
