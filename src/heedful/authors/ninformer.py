"""NiNformer: Abdullah-88/NiNformer, the gating unit and the model."""

from heedful.authors.table import Table

_UNIT = (
    (r"Mixer\.token_mix\.0\.(.*)", r"token_norm.\1"),
    (r"Mixer\.token_mix\.2\.net\.0\.(.*)", r"tokens.wide.\1"),
    (r"Mixer\.token_mix\.2\.net\.3\.(.*)", r"tokens.narrow.\1"),
    (r"Mixer\.channel_mix\.0\.(.*)", r"channel_norm.\1"),
    (r"Mixer\.channel_mix\.1\.net\.0\.(.*)", r"channels.wide.\1"),
    (r"Mixer\.channel_mix\.1\.net\.3\.(.*)", r"channels.narrow.\1"),
    (r"proj\.(.*)", r"proj.\1"),
)

TABLES = {
    "MixerGatingUnit": Table(rename=_UNIT),
    "NiNformer": Table(
        rename=(
            *(
                (rf"model\.(\d+)\.mgu\.{theirs}", r"blocks.\1.mixer." + ours.replace(r"\1", r"\2"))
                for theirs, ours in _UNIT
            ),
            (r"model\.(\d+)\.norm\.(.*)", r"blocks.\1.norm.\2"),
            (r"model\.(\d+)\.ffn\.net\.0\.(.*)", r"blocks.\1.mlp.wide.\2"),
            (r"model\.(\d+)\.ffn\.net\.3\.(.*)", r"blocks.\1.mlp.narrow.\2"),
        )
    ),
}
