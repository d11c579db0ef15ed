"""Mono-InternVL: OpenGVLab/Mono-InternVL, one layer of its InternLM2 with visual experts (version 1.0)."""

from heedful.authors.table import Table

TABLES = {
    "ModalityExpertLayer": Table(
        rename=(
            (r"attention\.wqkv\.weight", "qkv.weight"),
            (r"attention\.wo\.weight", "out.weight"),
            (r"feed_forward\.w1\.weight", "ffn.text.gate.weight"),
            (r"feed_forward\.w3\.weight", "ffn.text.up.weight"),
            (r"feed_forward\.w2\.weight", "ffn.text.down.weight"),
            (r"feed_forward_ve\.w1\.weight", "ffn.visual.gate.weight"),
            (r"feed_forward_ve\.w3\.weight", "ffn.visual.up.weight"),
            (r"feed_forward_ve\.w2\.weight", "ffn.visual.down.weight"),
            (r"(attention_norm|ffn_norm)\.weight", r"\1.weight"),
        )
    )
}
