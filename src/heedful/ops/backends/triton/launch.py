"""Launching the kernels: buffers, strides, tile sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from heedful.ops.backends.triton import bits
from heedful.ops.backends.triton.bands import Band
from heedful.ops.backends.triton.configs import Config, candidates, launch_best
from heedful.ops.backends.triton.forward import attend
from heedful.ops.backends.triton.key_gradient import add_spares, key_gradient
from heedful.ops.backends.triton.query_gradient import query_gradient

if TYPE_CHECKING:
    from heedful.ops.backends.triton.run import Job

INTERPRETED = not isinstance(attend, triton.runtime.JITFunction)


@dataclass(frozen=True, eq=False)
class Gradients:
    query: Tensor
    key: Tensor
    value: Tensor
    query_factor: Tensor | None
    key_factor: Tensor | None
    center: Tensor  # (b, hq, n): g . out - d lse


class _Problem:
    """What the three kernels have in common, by the names of their parameters."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_factor: Tensor | None,
        key_factor: Tensor | None,
        job: Job,
    ) -> None:
        self.lists, self.scale = job.lists, job.scale
        self.query, self.key, self.value = (_even_rows(x) for x in (query, key, value))
        self.batch, self.heads, self.n, d = query.shape
        self.kv_heads, self.m, e = key.shape[1], key.shape[2], value.shape[-1]
        self.rank = 0 if query_factor is None else query_factor.shape[-1]
        # Where there is nothing to pass, some tensor stands in; the kernels do not touch it.
        self.query_factor = self.key_factor = self.query
        if query_factor is not None and key_factor is not None:
            lead = (self.batch, self.heads)
            self.query_factor = _even_rows(query_factor).expand(*lead, -1, -1)
            self.key_factor = _even_rows(key_factor).expand(*lead, -1, -1)
        self.key_mask = query if job.key_mask is None else job.key_mask.contiguous().view(torch.uint8)
        self.width = _padded(max(d, e))
        lists, (bq, bk) = self.lists, self.lists.block_size
        one, two = (*lists.bands, *(Band(),) * 2)[:2]
        self.shared: dict[str, Any] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "query_factor": self.query_factor,
            "key_factor": self.key_factor,
            "key_mask": self.key_mask,
            **_strides("q", self.query),
            **_strides("k", self.key),
            **_strides("v", self.value),
            **_strides("fq", self.query_factor),
            **_strides("fk", self.key_factor),
            "repeats": self.heads // self.kv_heads,
            "n": self.n,
            "m": self.m,
            "query_blocks": lists.blocks[0],
            "offset": lists.offset,
            "scale": self.scale,
            "low": one.low,
            "high": one.high,
            "end_key": one.end,
            "low2": two.low,
            "high2": two.high,
            "end_key2": two.end,
            "D": d,
            "E": e,
            "R": self.rank,
            "PAD_D": _padded(d),
            "PAD_E": _padded(e),
            "PAD_R": _padded(self.rank),
            "BLOCK_Q": bq,
            "BLOCK_K": bk,
            "BANDS": len(lists.bands),
            "PARTIAL": bool(lists.bands) or lists.bits is not None,
            "KEY_MASK": job.key_mask is not None,
            "PRECISION": _precision(query),
        }
        self.query_bits, self.key_bits = bits.padded(bq), bits.padded(bk)

    def by_row(self) -> dict[str, Any]:
        """Parameters of the kernels that walk over the key blocks of a query block."""
        rows, packed = self.lists.rows, self.lists.bits
        return {
            **self.shared,
            "bounds": rows.bounds,
            "entries": rows.entry,
            "numbers": rows.entry if rows.mask is None else rows.mask,
            "masks": rows.entry if packed is None else packed.by_query,
            **_planes(rows.bounds),
            "entry_count": rows.entry.shape[-1],
            "heads": self.heads,
            "LINES": self.query_bits,
            "WORDS": self.key_bits // bits.WORD,
        }

    def by_column(self) -> dict[str, Any]:
        """Parameters of the kernel that walks over the query blocks of a key block."""
        columns, packed = self.lists.columns, self.lists.bits
        return {
            **self.shared,
            "items": columns.items,
            "entries": columns.entry,
            "numbers": columns.entry if columns.mask is None else columns.mask,
            "masks": columns.entry if packed is None else packed.by_key,
            **_planes(columns.items),
            "entry_count": columns.entry.shape[-1],
            "item_count": columns.items.shape[2],
            "spare_count": columns.spare_count,
            "kv_heads": self.kv_heads,
            "LINES": self.key_bits,
            "WORDS": self.query_bits // bits.WORD,
        }

    def start(self, kernel: Any, parameters: dict[str, Any], programs: Callable[[Config], int]) -> None:
        """Launch with the best tiles; programs tells how many programs they make."""
        (bq, bk), lists = self.lists.block_size, self.lists
        by_column = "items" in parameters
        walked, tokens = (bq, self.n) if by_column else (bk, self.m)

        def launch(config: Config) -> None:
            tile = config.rows if by_column else config.columns
            kernel[(programs(config),)](
                **parameters,
                ROWS=config.rows,
                COLUMNS=config.columns,
                EVEN=walked % tile == 0 and tokens % walked == 0,
                num_warps=config.warps,
                num_stages=config.stages,
            )

        name = kernel.fn.__name__
        choices = candidates(name, self.query.dtype, self.width, (bq, bk))
        constant = tuple(v for k, v in parameters.items() if k.isupper())
        key = (self.query.dtype, self.query.device, *constant)
        # Entries stand for the tiles visited; counting those exactly would make the host wait.
        pairs = self.batch * self.heads * lists.rows.entry.shape[-1] * bq * bk
        if INTERPRETED:
            launch(choices[0])
        else:
            launch_best(name, key, choices, pairs, launch)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_factor: Tensor | None,
    key_factor: Tensor | None,
    sink: Tensor | None,
    job: Job,
) -> tuple[Tensor, Tensor]:
    problem = _Problem(query, key, value, query_factor, key_factor, job)
    b, h, n = query.shape[:3]
    out = query.new_empty(b, h, n, value.shape[-1])
    lse = query.new_empty(b, h, n, dtype=torch.float32)
    own = {"sink": query if sink is None else sink, "out": out, "lse": lse, "SINK": sink is not None}
    problem.start(attend, problem.by_row() | own, lambda config: b * h * _row_tiles(job, config))
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_factor: Tensor | None,
    key_factor: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    job: Job,
) -> Gradients:
    problem = _Problem(query, key, value, query_factor, key_factor, job)
    (b, h, n, d), (hkv, m), e, r = query.shape, key.shape[1:3], value.shape[-1], problem.rank
    bk, columns = job.lists.block_size[1], job.lists.columns
    grad = _even_rows(grad)
    new = query.new_empty
    float32 = torch.float32
    dquery, dkey, dvalue = new(b, h, n, d), new(b, hkv, m, d), new(b, hkv, m, e)
    dquery_factor, dkey_factor = new(b, h, n, r, dtype=float32), new(b, hkv, m, r, dtype=float32)
    levels, centers = new(b, h, n, dtype=float32), new(b, h, n, dtype=float32)
    own = {
        "out": out,
        "lse": lse,
        "grad": grad,
        "grad_lse": lse if grad_lse is None else grad_lse.contiguous(),
        "dquery": dquery,
        "dquery_factor": dquery_factor,
        "levels": levels,
        "centers": centers,
        **_strides("g", grad),
        "GRAD_LSE": grad_lse is not None,
    }
    problem.start(query_gradient, problem.by_row() | own, lambda config: b * h * _row_tiles(job, config))
    spares = [new(b, hkv, columns.spare_count, bk, width, dtype=float32) for width in (d, e, r)]
    own = {
        "grad": grad,
        "levels": levels,
        "centers": centers,
        "dkey": dkey,
        "dvalue": dvalue,
        "dkey_factor": dkey_factor,
        "spare_k": spares[0],
        "spare_v": spares[1],
        "spare_f": spares[2],
        **_strides("g", grad),
    }
    problem.start(
        key_gradient,
        problem.by_column() | own,
        lambda config: b * hkv * columns.items.shape[2] * -(-bk // config.columns),
    )
    if columns.spare_count:
        for part, total in zip(spares, (dkey, dvalue, dkey_factor), strict=True):
            if total.numel():
                _add_spares(part, total, columns.spares, bk)
    if query_factor is None or key_factor is None:
        return Gradients(dquery, dkey, dvalue, None, None, centers)
    return Gradients(
        dquery,
        dkey,
        dvalue,
        dquery_factor.sum_to_size(query_factor.shape).to(query_factor.dtype),
        dkey_factor.sum_to_size(key_factor.shape).to(key_factor.dtype),
        centers,
    )


def _add_spares(part: Tensor, total: Tensor, ranges: Tensor, bk: int) -> None:
    b, hkv, m, width = total.shape
    key_blocks = ranges.shape[2]
    columns = min(32, max(16, 1 << (bk - 1).bit_length()))
    add_spares[(b * hkv * key_blocks * -(-bk // columns),)](
        part,
        total,
        ranges,
        **_planes(ranges),
        spare_count=part.shape[2],
        kv_heads=hkv,
        m=m,
        key_blocks=key_blocks,
        WIDTH=width,
        PAD=_padded(width),
        BLOCK_K=bk,
        COLUMNS=columns,
    )


def _row_tiles(job: Job, config: Config) -> int:
    return job.lists.blocks[0] * -(-job.lists.block_size[0] // config.rows)


def _even_rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}


def _planes(x: Tensor) -> dict[str, int]:
    """How far the table of the next batch row and head is; 0 where they share it."""
    b, h = x.shape[:2]
    return {"plane_b": h if b > 1 else 0, "plane_h": 1 if h > 1 else 0}


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length()) if width else 16


def _precision(x: Tensor) -> str:
    """float32 products are exact to rounding unless the user allows TF32, as in torch.matmul."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
