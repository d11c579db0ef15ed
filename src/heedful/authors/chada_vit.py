"""ChAda-ViT: nicoboou/chadavit."""

from torch import Tensor

from heedful.authors.table import Table

_LAYER = (
    (r"(.*)self_attn\.in_proj_(weight|bias)", r"\1qkv.\2"),
    (r"(.*)self_attn\.out_proj\.(.*)", r"\1out.\2"),
)


def _layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers are called blocks there; tables have axes of length 1."""
    state = {
        f"layers.{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name: value
        for name, value in state.items()
    }
    state["channels"] = state["channels"][0, :, 0]
    state["positions"] = state["positions"][0, 0]
    return state


TABLES = {
    "ChAdaLayer": Table(rename=_LAYER),
    "ChAdaViT": Table(
        rename=(
            (r"cls_token", "class_token"),
            (r"channel_token", "channels"),
            (r"pos_embed", "positions"),
            (r"token_learner\.(.*)", r"patches.\1"),
            *_LAYER,
        ),
        relayout=_layers,
    ),
}
