"""Vision transformer with a block of LLaMA: ziqipang/LM4VisualEncoding."""

from heedful.authors.frozen_lm_block import LLAMA
from heedful.authors.inline_deit import DEIT
from heedful.authors.table import Table

TABLES = {"ViTWithLMBlock": Table(rename=(*((theirs, f"lm.{ours}") for theirs, ours in LLAMA), *DEIT))}
