"""What the output rests on: the section of the page on attributions, and its plain words."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape

from heedful.inspect import charts
from heedful.inspect.deletion import Curve
from heedful.inspect.explanations import Explanation, Explanations
from heedful.inspect.saliency_words import saliency_words

COLOURS = {
    "gradient": "#7570b3",
    "gradient × input": "#1b9e77",
    "integrated gradients": "#d95f02",
    "attention × gradient": "#e7298a",
    "attention rollout": "#a6761d",
    "occlusion": "#1f78b4",
}
GREY = "#8a9099"
LEAD = (
    "Several ways to say how much each part of the input has to do with a number that the model gives. "
    "Orange raises it, blue lowers it; each is scaled to its own largest score. Gradient and rollout know no "
    "sign."
)


def body(found: Explanations) -> Markup:
    """Scores by token or on the image, the agreement of the methods, and what they foretell."""
    parts = [_image(each) if each.sample.grid else _text(each) for each in found.samples]
    if found.samples:
        parts += [_agreement(found), _foretold(found)]
    parts += [Markup("<p class='note'>{}</p>").format(reason) for reason in found.missing]
    return Markup("").join(parts)


def _heading(each: Explanation) -> Markup:
    what = "any patch" if each.sample.grid else "any but the grey tokens, which always stay"
    note = Markup(
        "<p class='note'>Explained is {}: {:.3g} for this input, {:.3g} without {}. Integrated gradients "
        "share out {:.0f} % of the difference.</p>"
    )
    told = note.format(each.target.name, each.value, each.nothing, what, 100 * (1 + each.gap))
    return Markup("<h3>{}</h3>").format(each.sample.title) + told


def _text(each: Explanation) -> Markup:
    table = np.stack([found.scores.numpy() for found in each.attributions])
    methods = [found.method for found in each.attributions]
    fixed = (~each.free).tolist()
    chart = charts.signed_heat(table, methods, each.target.tokens, "scores by token", fixed=fixed)
    return _heading(each) + _in_words(each) + Markup("<div class='wide'>{}</div>").format(chart)


def _in_words(each: Explanation) -> Markup:
    """The integrated gradients in a sentence: what leads from the number for nothing to that for the text."""
    (found,) = (a for a in each.attributions if a.method == "integrated gradients")
    towards = found.scores if each.value >= each.nothing else -found.scores
    text = saliency_words(found.tokens, towards).replace(" ##", "")  # pieces of a word joined
    return Markup("<p>In words, by integrated gradients: {}</p>").format(text or "no part stands out.")


def _image(each: Explanation) -> Markup:
    figures = []
    for found in each.attributions:
        scores = found.map().numpy()
        most = float(np.abs(scores).max())
        height, width = scores.shape
        cells = "".join(
            f'<rect x="{x}" y="{y}" width="1" height="1" {charts.signed(float(scores[y, x]), most)}>'
            f"<title>{escape(found.method)}, row {y + 1}, column {x + 1}: {scores[y, x]:+.3g}</title></rect>"
            for y in range(height)
            for x in range(width)
        )
        figures.append(
            f'<figure><div><img src="{each.sample.picture}" alt=""><svg viewBox="0 0 {width} {height}" '
            f'preserveAspectRatio="none" shape-rendering="crispEdges">{cells}</svg></div>'
            f"<figcaption>{escape(found.method)}</figcaption></figure>"
        )
    return _heading(each) + Markup("<div class='scores'>" + "".join(figures) + "</div>")


def _agreement(found: Explanations) -> Markup:
    agreement = found.agreement()
    chart = charts.matrix(agreement.table.numpy(), agreement.methods, "agreement of the methods")
    return Markup(
        "<h3>Do they agree?</h3><p class='note'>Kendall's tau of the sizes of their scores, over the parts "
        "that can go, the mean over {}: 1 is the same ranking, 0 none in common, −1 the reverse. That "
        "methods agree does not make them right.</p><div class='wide'>{}</div>"
    ).format(_count(found), chart)


def _foretold(found: Explanations) -> Markup:
    areas = found.areas()
    best = (min(row[1] for row in areas), max(row[2] for row in areas))
    rows = Markup("")
    for name, *own in areas:
        rows += Markup("<tr><td><i style='background:{}'></i>{}</td>").format(COLOURS.get(name, GREY), name)
        for x, top in zip(own, best, strict=True):
            cell = Markup("<td><b>{:.2f}</b></td>" if round(x, 2) == round(top, 2) else "<td>{:.2f}</td>")
            rows += cell.format(x)
        rows += Markup("</tr>")
    shown = []
    for which, across in (("deletion", "taken away, highest first"), ("insertion", "put in, highest first")):
        curves = [
            (name, COLOURS.get(name, ""), _mean([getattr(each, which)[i] for each in found.samples]))
            for i, (name, *_) in enumerate(areas)
        ]
        shown.append(charts.lines(curves, across, which))
    return Markup(
        "<h3>Do they foretell what happens?</h3><p class='note'>Parts are taken away from the highest score "
        "down, or put into an empty input; 1 is the number for the whole input, 0 that for an empty one. "
        "The table has the area below each curve, the mean over {}. The dashed line is the mean of orders "
        "by chance.</p><div class='pair foretold'><table><tr><th></th><th>taken away<br>small is good</th>"
        "<th>put in<br>large is good</th></tr>{}</table>{}{}</div>"
    ).format(_count(found), rows, *shown)


def _mean(curves: list[Curve]) -> np.ndarray:
    """Their mean at even shares."""
    at = np.linspace(0, 1, 21)
    return np.mean([np.interp(at, c.shares.numpy(), c.values.numpy()) for c in curves], axis=0)


def _count(found: Explanations) -> str:
    what = "image" if found.samples[0].sample.grid else "text"
    count = len(found.samples)
    return f"{count} {what}{'s' * (count > 1)}"


def plain(found: Explanations) -> str:
    """In sentences that need no knowledge of attribution."""
    first = found.samples[0]
    (left_out,) = (a for a in first.attributions if a.method == "occlusion")
    back = left_out.scores / (first.value - first.nothing)
    top = int(back.argmax())
    token, drop = first.target.tokens[top], float(back[top])
    part = f"the patch in row {token.replace(',', ', column ')}" if first.sample.grid else f"“{token}”"
    mean = found.agreement().mean
    rows = found.areas()
    chance = rows[-1][1]
    best = min(rows[:-1], key=lambda row: row[1])
    worst = max(rows[:-1], key=lambda row: row[1])
    agree = "well" if mean > 0.6 else "in part" if mean > 0.25 else "hardly"
    text = (
        f"In the first example the output rests most on {part}: without it the model goes "
        f"{100 * max(0.0, drop):.0f} % of the way back to what it says of an empty input. The "
        f"{len(rows) - 1} methods that rank the parts agree {agree} (Kendall's tau {mean:.2f} on average). "
        f"What happens when parts are taken away is foretold best by {best[0]} (area {best[1]:.2f}, by "
        f"chance {chance:.2f})"
    )
    if worst[1] >= chance:
        text += f"; {worst[0]} does no better than chance ({worst[1]:.2f})"
    return text + "."
