"""A page to edit which cells of an image count, and to see the decision change."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from heedful import __version__
from heedful.inspect.correspondence_classifier import CorrespondenceVerdict


def write_correspondence_page(
    found: CorrespondenceVerdict,
    path: str | Path,
    *,
    query: Image.Image,
    pictures: Sequence[Image.Image],
    names: Mapping[int, str] | None = None,
    title: str = "Where to look",
) -> None:
    """One HTML file that needs nothing else: click cells of the query, and the neighbours vote anew.

    found     what a `CorrespondenceClassifier` says of the query
    query     the picture as the model saw it, so that the grid of cells covers all of it
    pictures  of the neighbours, in the order of `found.neighbours`
    names     of the labels; None: their numbers

    ValueError where the pictures are not as many as the neighbours. Source: CHM-Corr++, arXiv 2404.05238.
    """
    if len(pictures) != len(found.neighbours):
        raise ValueError(f"pictures are {len(pictures)}, must be {len(found.neighbours)}, one a neighbour")
    automatic = bool((found.masks == found.automatic).all())
    data = {
        "grid": found.similarity.shape[-1],
        "top": found.top,
        "voters": found.voters,
        "query": _address(query),
        "mask": None if automatic else found.masks[0].flatten().int().tolist(),
        "neighbours": [
            {
                "label": int(label),
                "name": (names or {}).get(int(label), str(int(label))),
                "place": int(place),
                "similarity": [round(x, 6) for x in similarity.flatten().tolist()],
                "automatic": mask.flatten().int().tolist(),
                "cells": cells.tolist(),
                "picture": _address(picture),
            }
            for label, place, similarity, mask, cells, picture in zip(
                found.labels,
                found.neighbours,
                found.similarity,
                found.automatic,
                found.cells,
                pictures,
                strict=True,
            )
        ],
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(
        files("heedful.inspect").joinpath("correspondence_page.html").read_text("utf-8")
    )
    told = Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    Path(path).write_text(page.render(title=title, data=told, version=__version__), encoding="utf-8")


def _address(picture: Image.Image) -> str:
    """As a data: address; small pictures keep their pixels."""
    small = picture.convert("RGB")
    small.thumbnail((360, 360))
    buffer = io.BytesIO()
    kind = "PNG" if max(small.size) <= 64 else "JPEG"
    small.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
