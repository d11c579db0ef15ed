"""The blocks of SpectFormer: badripatro/SpectFormers, both architectures."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table


def _split_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values are one projection there; linear maps of tokens are 1 x 1 convolutions of maps here."""
    ours = {}
    for name, value in state.items():
        if ".kv." in f".{name}":
            key, val = value.chunk(2)
            ours[name.replace("kv.", "key.")], ours[name.replace("kv.", "value.")] = key, val
        elif name.startswith(("fc1.", "fc2.")) and value.ndim == 2:
            ours[name] = value[:, :, None, None]
        else:
            ours[name] = value
    return ours


_ATTENTION = (
    (r"attn\.q\.(.*)", r"attention.query.\1"),
    (r"attn\.kv\.(.*)", r"attention.kv.\1"),
    (r"attn\.proj\.(.*)", r"attention.out.\1"),
)

TABLES = {
    "SpectralBlock": Table(),
    "HierarchicalBlock": Table(
        rename=(
            *((theirs, f"mixer.{ours}") for theirs, ours in _ATTENTION),
            (r"attn\.complex_weight", "mixer.complex_weight"),
            (r"mlp\.dwconv\.dwconv\.(.*)", r"dwconv.\1"),
            (r"mlp\.(.*)", r"\1"),
        ),
        relayout=_split_keys,
    ),
    "ClassBlock": Table(rename=_ATTENTION, relayout=_split_keys),
}
