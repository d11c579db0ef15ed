"""MaxViT: the variables of google-research/maxvit (TensorFlow), and the names of timm's port of them."""

import re

import torch
from torch import Tensor

from heedful.authors.table import Table

_PARTS = {
    "mbconv/shortcut_conv": "conv.shortcut",
    "mbconv/pre_norm": "conv.pre_norm",
    "mbconv/expand_conv": "conv.conv1",
    "mbconv/expand_norm": "conv.norm1",
    "mbconv/depthwise_conv": "conv.conv2",
    "mbconv/depthwise_norm": "conv.norm2",
    "mbconv/se/reduce_conv2d": "conv.se.fc1",
    "mbconv/se/expand_conv2d": "conv.se.fc2",
    "mbconv/shrink_conv": "conv.conv3",
    **{
        f"{theirs}{number}{inner}": f"{group}.{ours}"
        for group, number in (("attn_block", ""), ("attn_grid", "_1"))
        for theirs, inner, ours in (
            ("attn_layer_norm", "", "norm1"),
            ("ffn_layer_norm", "", "norm2"),
            ("ffn", "/expand_dense", "mlp.fc1"),
            ("ffn", "/shrink_dense", "mlp.fc2"),
            ("attention", "", "mixer"),
            *(("attention", f"/{part}", f"mixer.{part}") for part in "qkvo"),
        )
    },
    "conv_0": "stem.conv1",
    "norm_0": "stem.norm1",
    "conv_1": "stem.conv2",
    "maxvit/final_layer_norm": "norm",
    "inner_dense": "pre_logits",
    "logit_dense": "head",
}
_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "depthwise_kernel": "weight",
}


def _name(theirs: str) -> str:
    part, leaf = theirs.rsplit("/", 1)
    block, found = "", re.fullmatch(r"(?:maxvit/block_(\d+)_(\d+)|block)/(.*)", part)
    if found:
        part = found[3]
        block = f"stages.{int(found[1])}.{int(found[2])}." if found[1] else ""
    return f"{block}{_PARTS.get(part, part)}.{_LEAVES.get(leaf, leaf)}"


def _layout(theirs: str, value: Tensor) -> Tensor:
    leaf = theirs.rsplit("/", 1)[-1]
    if leaf == "kernel":  # height, width, in, out
        return value.permute(3, 2, 0, 1)
    if leaf == "depthwise_kernel":  # height, width, channels, 1
        return value.permute(2, 3, 0, 1)
    if leaf != "weight":
        return value.flatten() if re.search(r"/[qkv]/bias$", theirs) else value
    if value.ndim == 2:  # in, out
        return value.T
    # In, heads, width; but heads, width, out behind the heads.
    return (value.flatten(0, 1) if theirs.endswith("/o/weight") else value.flatten(1)).T


def tensorflow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """TensorFlow's variables, of a model or of one block, under heedful's names; others stay."""
    ours = {_name(n) if "/" in n else n: _layout(n, t) if "/" in n else t for n, t in state.items()}
    for name in [*ours]:
        if found := re.fullmatch(r"(.*mixer\.)q\.(weight|bias)", name):
            ours[f"{found[1]}qkv.{found[2]}"] = torch.cat(
                [ours.pop(f"{found[1]}{p}.{found[2]}") for p in "qkv"]
            )
            ours[f"{found[1]}proj.{found[2]}"] = ours.pop(f"{found[1]}o.{found[2]}")
        elif name.endswith(".running_mean"):  # TensorFlow does not count batches
            ours.setdefault(
                name.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.long)
            )
    return ours


_TIMM = r"stages\.(\d+)\.blocks\.(\d+)\."

TABLES = {
    "MaxViT": Table(
        rename=(
            (_TIMM + r"conv\.shortcut\.expand\.(.*)", r"stages.\1.\2.conv.shortcut.\3"),
            (_TIMM + r"conv\.conv([123])_\dx\d\.(.*)", r"stages.\1.\2.conv.conv\3.\4"),
            (_TIMM + r"conv\.conv2_kxk\.(.*)", r"stages.\1.\2.conv.conv2.\3"),
            (
                _TIMM + r"(attn_\w+)\.attn\.rel_pos\.relative_position_bias_table",
                r"stages.\1.\2.\3.mixer.relative_bias",
            ),
            (_TIMM + r"(attn_\w+)\.attn\.(.*)", r"stages.\1.\2.\3.mixer.\4"),
            (_TIMM + r"(.*)", r"stages.\1.\2.\3"),
            (r"head\.norm\.(.*)", r"norm.\1"),
            (r"head\.pre_logits\.fc\.(.*)", r"pre_logits.\1"),
            (r"head\.fc\.(.*)", r"head.\1"),
        ),
        relayout=tensorflow,
    ),
    "Block": Table(relayout=tensorflow),
}
