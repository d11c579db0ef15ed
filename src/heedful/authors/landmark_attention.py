"""Landmark attention: epfml/landmark-attention, one `attn` of its lm_benchmark models (insert=False).

There a landmark is a token of the vocabulary, so the layer itself holds none.
"""

from torch import Tensor

from heedful.authors.table import Table


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their one projection gives queries, keys and values, in this order."""
    ours = {name: value for name, value in state.items() if name != "c_attn.weight"}
    if "c_attn.weight" in state:
        names = ("query.weight", "key.weight", "value.weight")
        ours |= zip(names, state["c_attn.weight"].chunk(3), strict=True)
    return ours


TABLES = {
    "LandmarkAttention": Table(
        rename=((r"c_proj\.weight", "out.weight"),),
        drop=("bias", r"(.*\.)?freqs"),  # the causal mask; rotary frequencies of base 10000
        relayout=_split,
    )
}
