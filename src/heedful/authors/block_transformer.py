"""Block Transformer: itsnamgyu/block-transformer, with its GPT-NeoX decoders.

The block decoder may stand behind a `gpt_neox.` of its own; queries, keys and values lie in heedful as there.
"""

from heedful.authors.table import Table

_PARTS = (
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
    (r"attention\.query_key_value", "qkv"),
    (r"attention\.dense", "out"),
    (r"mlp\.dense_h_to_4h", "wide"),
    (r"mlp\.dense_4h_to_h", "narrow"),
)
_DECODERS = (
    (r"block_decoder\.(?:gpt_neox\.)?", "block_decoder."),
    (r"token_decoder\.gpt_neox\.", "token_decoder.neox."),
)

TABLES = {
    "BlockTransformer": Table(
        drop=(r".*\.attention\.(bias|masked_bias)", r".*rotary_emb\.inv_freq"),
        rename=(
            (r"embedder\.embeddings\.weight", "embedder.embedding.weight"),
            (r"token_decoder\.gpt_neox\.embed_in\.weight", "token_decoder.embedding.weight"),
            (r"token_decoder\.embed_out\.weight", "token_decoder.head.weight"),
            (r"token_decoder\.expansion_layer\.(.*)", r"token_decoder.expansion.conv.\1"),
            *(
                (rf"{theirs}layers\.(\d+)\.{part}\.(\w+)", rf"{ours}layers.\1.{name}.\2")
                for theirs, ours in _DECODERS
                for part, name in _PARTS
            ),
            *((rf"{theirs}final_layer_norm\.(\w+)", rf"{ours}norm.\1") for theirs, ours in _DECODERS),
        ),
    ),
    "BlockEmbedder": Table(
        rename=((r"embeddings\.weight", "embedding.weight"), (r"projection_layer\.(.*)", r"projection.\1"))
    ),
}
