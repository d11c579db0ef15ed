"""Frozen LM block: ziqipang/LM4VisualEncoding, with the names of Meta's LLaMA inside."""

from heedful.authors.table import Table

LLAMA = (
    (r"llama\.layers\.(\d+)\.attention\.wq\.(.*)", r"blocks.\1.query.\2"),
    (r"llama\.layers\.(\d+)\.attention\.wk\.(.*)", r"blocks.\1.key.\2"),
    (r"llama\.layers\.(\d+)\.attention\.wv\.(.*)", r"blocks.\1.value.\2"),
    (r"llama\.layers\.(\d+)\.attention\.wo\.(.*)", r"blocks.\1.out.\2"),
    (r"llama\.layers\.(\d+)\.feed_forward\.w1\.(.*)", r"blocks.\1.mlp.gate.\2"),
    (r"llama\.layers\.(\d+)\.feed_forward\.w3\.(.*)", r"blocks.\1.mlp.up.\2"),
    (r"llama\.layers\.(\d+)\.feed_forward\.w2\.(.*)", r"blocks.\1.mlp.down.\2"),
    (r"llama\.layers\.(\d+)\.attention_norm\.(.*)", r"blocks.\1.norm1.\2"),
    (r"llama\.layers\.(\d+)\.ffn_norm\.(.*)", r"blocks.\1.norm2.\2"),
    (r"llama\.norm\.(.*)", r"norm.\1"),
    (r"llama_dim_mapper1\.(.*)", r"enter.\1"),
    (r"llama_dim_mapper2\.(.*)", r"leave.\1"),
)

TABLES = {"FrozenLMBlock": Table(rename=LLAMA)}
