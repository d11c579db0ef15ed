"""TransNormerLLM: the released Hugging Face models of OpenNLPLab/TransnormerLLM."""

from heedful.authors.table import Table

TABLES = {
    "TransNormerLLM": Table(
        rename=(
            (r"model\.embed_tokens\.weight", "embed.weight"),
            (r"model\.layers\.(\d+)\.token_mixer\.lrpe\.theta", r"layers.\1.mixer.theta"),
            (r"model\.layers\.(\d+)\.token_mixer\.(.*)", r"layers.\1.mixer.\2"),
            (r"model\.layers\.(\d+)\.channel_mixer\.(.*)", r"layers.\1.mlp.\2"),
            (r"lm_head\.weight", "head.weight"),
        )
    )
}
