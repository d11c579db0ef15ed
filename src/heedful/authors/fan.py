"""Channel processing of FAN: guoyongcs/TAPADL."""

from torch import Tensor

from heedful.authors.table import Table


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Temperatures (heads, 1, 1) as a vector."""
    return {n: t.flatten() if n == "temperature" else t for n, t in state.items()}


TABLES = {
    "ChannelProcessing": Table(
        rename=(
            (r"mlp_v\.dwconv\.(.*)", r"\1"),
            (r"mlp_v\.(.*)", r"\1"),
            (r"norm_v\.(.*)", r"norm.\1"),
            (r"q\.(.*)", r"query.\1"),
        ),
        relayout=_flat,
    )
}
