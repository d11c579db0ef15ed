"""Who sees whom, in the form that kernels walk over."""

from heedful.selection.block_table import FULL, PARTIAL, BlockTable
from heedful.selection.token_groups import TokenGroups

__all__ = ["FULL", "PARTIAL", "BlockTable", "TokenGroups"]
