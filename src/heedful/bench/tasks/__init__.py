"""The tasks of `heedful compare`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from heedful.bench.tasks import images, text
from heedful.bench.tasks.images import Images
from heedful.bench.tasks.recall import Recall
from heedful.bench.tasks.task import IGNORE, Measure, Task
from heedful.bench.tasks.text import Text

__all__ = ["IGNORE", "TASKS", "Images", "Measure", "Recall", "Task", "Text", "make_tasks"]

TASKS = ("recall", "text", "images")


def make_tasks(name: str = "all", data: Path | None = None) -> list[Task]:
    """The task of that name, or all; `data` is a text file or a folder of photographs.

    The task recall takes its numbers behind its name: "recall:length=512,pairs=8".
    Raises ValueError if there is no such task or number, or if the data is missing or unfit.
    """
    name, colon, given = name.partition(":")
    if colon and name != "recall":
        raise ValueError(f"the task {name!r} takes no numbers; only recall does, as in recall:length=512")
    if name not in (*TASKS, "all"):
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}, or all")
    if data is not None and not data.exists():
        raise ValueError(f"{data} does not exist")
    if data is not None and name == "recall":
        raise ValueError("the task recall makes its own data; data is for text (a file) or images (a folder)")
    file = folder = data
    if data is not None and name == "all":  # what the data is for shows by what it is
        file, folder = (None, data) if data.is_dir() else (data, None)
    tasks: list[Task] = []
    if name in ("recall", "all"):
        tasks.append(Recall(**_numbers(given)))
    if name in ("text", "all"):
        tasks.append(Text(*text.load(file)))
    if name in ("images", "all"):
        tasks.append(images.digits() if folder is None else images.folder(folder))
    return tasks


def _numbers(text: str) -> dict[str, int]:
    """The numbers of the task recall from a text such as "length=512,pairs=8"."""
    known = [f.name for f in fields(Recall) if f.type == "int"]
    numbers = {}
    for item in filter(None, (i.strip() for i in text.split(","))):
        key, _, value = item.partition("=")
        if key not in known or not value.isdecimal():
            raise ValueError(
                f"{item!r} does not fit the task recall, which takes whole numbers: {', '.join(known)}"
            )
        numbers[key] = int(value)
    return numbers
