"""Block-sparse attention in plain PyTorch, forward and backward, on any device.

`walk` goes over the query blocks of a table that all batch rows and heads share and reads runs of
keys as views; `gather` takes scattered keys together for many small groups at once; `tile` computes
one tile. Nothing holds an n x m buffer, and backward recomputes what it needs.
"""

from heedful.ops.backends.tiled.run import run, unsupported

__all__ = ["run", "unsupported"]
