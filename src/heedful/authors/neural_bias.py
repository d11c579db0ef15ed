"""FlashBias: thuml/FlashBias, the two nets in a triangle attention of AlphaFold 3."""

from heedful.authors.table import Table

TABLES = {
    "NeuralBias": Table(
        rename=(
            (r"linear_q_flashbias\.([024])\.weight", r"query.\1.weight"),
            (r"linear_k_flashbias\.([024])\.weight", r"key.\1.weight"),
        )
    )
}
