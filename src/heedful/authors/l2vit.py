"""L2ViT: ChuanyangZheng/L2ViT. The linear attention has the authors' names."""

from __future__ import annotations

from heedful.authors.table import Table

_STAGE = r"(stages\.\d+\.\d+\.)"


def _block(prefix: str) -> tuple[tuple[str, str], ...]:
    """A block of either kind, behind a prefix with one group."""
    return (
        (prefix + r"cpe\.(\d)\.proj\.(.*)", r"\1positions.\2.\3"),
        (prefix + r"attn\.(.*)", r"\1mixer.\2"),
        (prefix + r"local_mp\.(.*)", r"\1local.\2"),
    )


# Behind its padding a convolution stands second or third in its sequence.
_STEM = {0: 1, 1: 2, 3: 4, 4: 5}

TABLES = {
    "ReLULinearAttention": Table(),
    "WindowBlock": Table(rename=_block("()")),
    "GlobalBlock": Table(rename=_block("()")),
    "L2ViT": Table(
        rename=(
            *_block(_STAGE),
            *(
                (rf"downsample_layers\.0\.proj\.proj\.{a}\.(.*)", rf"downsample.0.{b}.\1")
                for a, b in _STEM.items()
            ),
            (r"downsample_layers\.0\.norm\.(.*)", r"downsample.0.6.\1"),
            (r"downsample_layers\.(\d)\.norm\.(.*)", r"downsample.\1.0.\2"),
            (r"downsample_layers\.(\d)\.proj\.(.*)", r"downsample.\1.2.\2"),
        )
    ),
}
