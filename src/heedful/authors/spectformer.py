"""SpectFormer: badripatro/SpectFormers, both architectures. The names of the filter are the authors'."""

from __future__ import annotations

import re

from torch import Tensor

from heedful.authors import spectformer_blocks
from heedful.authors.table import Table, inside

_STEM = {"conv": "", "proj": "9.", "norm": "10."}


def _two_lists(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that filter and blocks that attend stand in one list there."""
    filters = len({name.split(".")[1] for name in state if re.fullmatch(r"blocks\.\d+\.filter\..*", name)})
    ours = {}
    for name, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
            place = int(found[1])
            name = (
                f"filters.{place}.{found[2]}"
                if place < filters
                else f"blocks.{place - filters}.{found[2].replace('attn.', 'mixer.')}"
            )
        ours[name] = value
    return ours


def _modules(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tables = spectformer_blocks.TABLES
    state = inside(r"stages\.\d\.\d+\.", tables["HierarchicalBlock"])(state)
    return inside(r"class_block\.", tables["ClassBlock"])(state)


TABLES = {
    "SpectralGating": Table(),
    "SpectFormer": Table(
        rename=((r"pos_embed", "positions"), (r"patch_embed\.proj\.(.*)", r"embed.\1")),
        relayout=_two_lists,
    ),
    "HierarchicalSpectFormer": Table(
        rename=(
            *(
                (rf"patch_embed1\.{theirs}\.(.*)", rf"downsample.0.{ours}\1")
                for theirs, ours in _STEM.items()
            ),
            *(
                (rf"patch_embed{s + 1}\.{theirs}\.(.*)", rf"downsample.{s}.{ours}.\1")
                for s in (1, 2, 3)
                for theirs, ours in (("proj", 0), ("norm", 1))
            ),
            *((rf"block{s + 1}\.(.*)", rf"stages.{s}.\1") for s in range(4)),
            *((rf"norm{s + 1}\.(.*)", rf"norms.{s}.\1") for s in range(3)),
            (r"norm4\.(.*)", r"norm.\1"),
            (r"post_network\.0\.(.*)", r"class_block.\1"),
            (r"aux_head\.(.*)", r"token_head.\1"),
        ),
        relayout=_modules,
    ),
}
