"""Block-sparse attention in Triton, forward and backward, on CUDA.

A kernel walks over lists of tiles that `lists` makes from a block table: `forward` and the query
gradients over the key blocks of a query block, the key and value gradients over the query blocks of a
key block. Tiles that are fully visible are not masked; the others compare positions where the pattern
consists of `bands`, and read packed bits (`bits`) elsewhere. Nothing holds an n x m buffer of numbers.
"""

from heedful.ops.backends.triton.run import run, suits, unsupported

__all__ = ["run", "suits", "unsupported"]
