"""p-adapter: wuhy68/p-Adapter, one attention block of its text decoder, what follows the heads in it, or the
`text_ffn_adapter` beside a feed-forward net."""

from heedful.authors.table import Table

_OUTPUT = (
    (r"dense\.(.*)", r"dense.\1"),
    (r"LayerNorm\.(.*)", r"norm.\1"),
    (r"text_laplacian_adapter_i\.(.*)", r"adapter.down.\1"),
    (r"text_laplacian_adapter_gate\.(.*)", r"adapter.gate.\1"),
    (r"text_laplacian_adapter_o\.(.*)", r"adapter.up.\1"),
    ("laplacian_adapter_p", "adapter.p"),
    ("laplacian_adapter_mu", "adapter.theta"),
)

TABLES = {
    "FFNAdapter": Table(rename=((r"0\.(.*)", r"down.\1"), (r"2\.(.*)", r"up.\1"))),
    "AdaptedOutput": Table(rename=_OUTPUT),
    "PAdapterAttention": Table(
        rename=(
            (r"self\.(query|key|value)\.(.*)", r"\1.\2"),
            *((rf"output\.{theirs}", f"output.{ours}") for theirs, ours in _OUTPUT),
        )
    ),
}
