"""What attention carries from the input to the top, through all layers: rollout and flow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_choice
from heedful.inspect.site import Site
from heedful.registry import register


def with_residual(weights: Float[Tensor, "*b n n"], *, residual: float = 0.5) -> Float[Tensor, "*b n n"]:
    """(1 - residual) A + residual I, rows made to add up to 1 again."""
    eye = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    mixed = (1 - residual) * weights + residual * eye
    return mixed / mixed.sum(-1, keepdim=True)


@register("attention-rollout", kind="inspect", paper="attention-flow", tags=("rollout", "attribution"))
class AttentionRollout:
    """The product of the layers' attention, residual streams included: R_l = A'_l R_{l-1}, R_0 = I.

        A'_l = normalised((1 - residual) heads(A_l) + residual I)

    Feed it the layers in order, e.g. as `see` of `capture`; one table is kept, whatever the depth.

    heads     "mean" or "max" over the heads
    residual  the share of the residual stream

    `table` is R: row i says from which inputs the output i is made. Self-attention of one length only.
    Source: Quantifying Attention Flow in Transformers, arXiv 2005.00928.
    """

    def __init__(self, *, heads: str = "mean", residual: float = 0.5) -> None:
        check_choice("heads", heads, ("mean", "max"))
        if not 0.0 <= residual < 1.0:
            raise ValueError(f"residual is {residual}, must lie in [0, 1)")
        self.heads, self.residual = heads, residual
        self.table: Float[Tensor, "b n n"] | None = None

    def add(self, weights: Float[Tensor, "b h n n"]) -> None:
        """One layer more."""
        joined = weights.mean(1) if self.heads == "mean" else weights.amax(1)
        step = with_residual(joined, residual=self.residual)
        if self.table is not None and self.table.shape != step.shape:
            raise ValueError(f"weights give {tuple(step.shape)}, must be {tuple(self.table.shape)} as before")
        self.table = step if self.table is None else step @ self.table

    def __call__(self, site: Site) -> None:
        if not site.cross:
            self.add(site.weights().float())


@register("rollout-responses", kind="inspect", paper="dcal", tags=("rollout", "image"))
def rollout_responses(
    layers: Sequence[Float[Tensor, "b h n n"] | Site],
    *,
    token: int | slice = 0,
    residual: float = 0.5,
) -> Float[Tensor, "b n"]:
    """How much a token of the last layer responds to each input: one row of the rollout, without its table.

        r = e_t^T S'_L ... S'_1,   S'_l = (1 - residual) mean_h S_l + residual I, rows adding up to 1

    layers  weights of each layer, first to last, or the calls themselves: `capture(model, sites.append)`.
            Of calls, weights are made again piece by piece, so that no n x n table exists
    token   whose row; of a slice, the mean of the rows

    Without the class token's own entry, r[:, 1:] of token 0, this is what a ViT's class token responds to
    (`high_responses` picks from it). Cross-attention is left out; ValueError if nothing is left.
    Source: Dual Cross-Attention Learning, arXiv 2205.02151.
    """
    layers = [layer for layer in layers if isinstance(layer, Tensor) or not layer.cross]
    if not layers:
        raise ValueError("layers is empty, must hold at least one layer of self-attention")
    top = layers[-1] if isinstance(layers[-1], Tensor) else layers[-1].query
    row = top.new_zeros(top.shape[0], top.shape[2], dtype=torch.promote_types(top.dtype, torch.float32))
    row[:, token] = 1
    row = row / row.sum(-1, keepdim=True)
    for layer in reversed(layers):
        n, m = layer.shape[2:]
        if not n == m == row.shape[1]:
            raise ValueError(f"layers has weights of {n} x {m}, must be square and of one length")
        weights, pieces = _readable(layer)
        below = torch.zeros_like(row)
        for rows in pieces:
            mixed = (1 - residual) * weights(rows).to(row).mean(1)
            share = row[:, rows] / (mixed.sum(-1) + residual)
            below += (share[:, None] @ mixed)[:, 0]
            below[:, rows] += residual * share
        row = below
    return row


def _readable(layer: Tensor | Site) -> tuple[Callable[[slice], Tensor], Iterable[slice]]:
    """A layer's weights by rows, and the pieces in which to ask for them."""
    if isinstance(layer, Tensor):
        return lambda rows: layer[:, :, rows], [slice(0, layer.shape[2])]
    return layer.weights, layer.pieces()


def high_responses(responses: Float[Tensor, "b n"], *, share: float = 0.1) -> Int[Tensor, "b k"]:
    """The patches with the highest responses, k = share n of them (one at least), in their own order.

    responses  of patches alone: `rollout_responses(...)[:, 1:]`
    share      0.1 for fine-grained recognition, 0.3 for re-identification in the paper

    These are the only queries of global-local cross-attention. Source: arXiv 2205.02151.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}, must lie in (0, 1]")
    count = max(1, int(share * responses.shape[-1] + 1e-9))
    return responses.topk(count, dim=-1).indices.sort(-1).values


@register("attention-flow", kind="inspect", paper="attention-flow", tags=("flow", "attribution"))
def attention_flow(
    layers: Sequence[Float[Tensor, "h n n"]], output: int, *, residual: float = 0.5
) -> Float[Tensor, " n"]:
    """The largest flow from one output down to each input, with the layers' attention as capacities.

    layers  weights of each layer, first to last
    output  the position at the top

    Edge i -> j of layer l has capacity (1 - residual) mean_h A_l[h, i, j] + residual [i = j]. Entry j is the
    maximum flow from the output to input j alone. O(n) maximum flows: for short texts.
    Source: arXiv 2005.00928.
    """
    tables = [with_residual(w.double().mean(0), residual=residual).tolist() for w in layers]
    n = len(tables[0])
    return torch.tensor([_max_flow(tables, output, j) for j in range(n)])


def _max_flow(tables: list[list[list[float]]], source: int, target: int) -> float:
    """Edmonds and Karp on the layered graph; node (l, i) is l * n + i, with the inputs at l = 0."""
    depth, n = len(tables), len(tables[0])
    room: list[dict[int, float]] = [{} for _ in range((depth + 1) * n)]
    for layer, table in enumerate(tables, start=1):
        for i in range(n):
            for j in range(n):
                if table[i][j] > 0:
                    room[layer * n + i][(layer - 1) * n + j] = table[i][j]
                    room[(layer - 1) * n + j].setdefault(layer * n + i, 0.0)
    start, end, total = depth * n + source, target, 0.0
    while True:
        came: dict[int, int] = {start: start}
        queue = deque([start])
        while queue and end not in came:
            node = queue.popleft()
            for other, left in room[node].items():
                if left > 1e-12 and other not in came:
                    came[other] = node
                    queue.append(other)
        if end not in came:
            return total
        path = [end]
        while path[-1] != start:
            path.append(came[path[-1]])
        steps = [*zip(path[1:], path[:-1], strict=True)]
        most = min(room[a][b] for a, b in steps)
        for a, b in steps:
            room[a][b] -= most
            room[b][a] += most
        total += most
