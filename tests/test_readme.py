"""The code of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    text = README.read_text(encoding="utf-8").split("## How it is used")[1].split("## What there is")[0]
    found = re.findall(r"(?:^    .*\n|^\n)+", text, flags=re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in found if block.strip()]


def test_the_examples_run():
    code = [b for b in blocks() if not b.strip().startswith("heedful ")]  # shell commands
    # What needs a pretrained model, released weights or a class of the reader's has tests of its own.
    skipped = ("generate(ids", "timm", "state_dict)", "MyMixer")
    code = [b for b in code if not any(word in b for word in skipped)]
    assert len(code) >= 5
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert names["o"].isfinite().all()
    assert names["y"].shape == (2, 1, 64)
