"""MambaOut: yuweihao/MambaOut, and timm's port, whose names differ. The block has the authors' names."""

from torch import Tensor

from heedful.authors.table import Table

_PLACES = {"conv1": "0.conv", "norm1": "0.norm", "conv2": "2.conv", "norm2": "2.norm"}


def _head_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """head.norm is the norm before the hidden layer in timm, the one behind it in the authors' code."""
    free = "norm2" if "norm1.weight" in state else "norm1"
    return {name.replace("head.norm.", f"{free}."): t for name, t in state.items()}


TABLES = {
    "GatedCNN": Table(),
    "MambaOut": Table(
        rename=(
            *(
                (rf"(?:stem|downsample_layers\.0)\.{a}\.(.*)", rf"downsample.0.{b}.\1")
                for a, b in _PLACES.items()
            ),
            (r"downsample_layers\.(.*)", r"downsample.\1"),
            (r"stages\.(\d+)\.downsample\.(.*)", r"downsample.\1.\2"),
            (r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(.*)", r"stages.\1.\2.mixer.\3"),
            (r"norm\.(.*)", r"norm1.\1"),
            (r"head\.(?:fc1|pre_logits\.fc)\.(.*)", r"hidden.\1"),
            (r"head\.pre_logits\.norm\.(.*)", r"norm2.\1"),
            (r"head\.(?:fc2|fc)\.(.*)", r"head.\1"),
        ),
        relayout=_head_norm,
    ),
}
