"""Block-sparse attention that gives dropped blocks their share back, estimated from block means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.ops.attention import attention, merge_partials
from heedful.registry import register
from heedful.selection import FULL, BlockTable


@dataclass(frozen=True, eq=False)
class RectifiedBlocks:
    """What the block means of queries and keys say about a sequence of n tokens.

    table   the selected key blocks, for each head: a pattern for `heedful.attention`
    share   (b, h, g): the part of a query block's attention that the selected blocks have to carry
    pooled  (b, h, g, g): the parts of those dropped key blocks whose mean value can be trusted; 0 elsewhere
    share and the sum of pooled add up to 1. Both pass gradients to queries and keys, the selection does not.
    """

    table: BlockTable
    share: Float[Tensor, "b h g"]
    pooled: Float[Tensor, "b h g g"]


@register(
    "rectified-blocks",
    kind="routing",
    paper="rectified-spaattn",
    tags=("sparse", "block", "video"),
    complexity="O(G^2 C)",
)
def rectified_blocks(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    *,
    block_size: int = 128,
    top_k: int,
    p_remain: float = 0.3,
    neighbors: Bool[Tensor, "g g"] | None = None,
    first_blocks: int = 0,
    text_key: Float[Tensor, "b h t d"] | None = None,
) -> RectifiedBlocks:
    """Which key blocks each query block sees, and how attention is shared out between seen and dropped.

        z_ij = mean_i(q) . mean_j(k),  p = softmax_j(z / sqrt(d))
        dq_i = mean_i |q - mean_i(q)|,  dk_j = mean_j |k - mean_j(k)|
        selected:  blocks by falling p until their sum exceeds p_remain, at least top_k of them; neighbors
        untrusted: |z_ij| <= |dq_i . mean_j(k)| + |mean_i(q) . dk_j|
        share_i = sum of p_ij over selected or untrusted j,  pooled_ij = p_ij for the other j

    Blocks are block_size successive tokens; the last one is filled up with zeros, which count in its means,
    as published. With text keys, which every block sees, p is taken over block means and text keys together,
    then a block's entry is multiplied by block_size, the text's are summed into one slot, and all are
    normalised; the slot takes part in the choice, and its p in the share.

    block_size    tokens of a block
    top_k         fewest slots chosen by p
    p_remain      sum of p up to which slots are chosen
    neighbors     blocks that are selected whatever their p, e.g. `heedful.routing.gilbert.block_neighbors`
    first_blocks  so many blocks at the beginning that all see each other
    text_key      keys of text that stand outside the blocks

    Raises ValueError on sizes that are not positive or neighbors of another shape.
    Source: Rectified SpaAttn, arXiv 2511.19835.
    """
    check_positive("block_size", block_size)
    check_positive("top_k", top_k)
    n, width = query.shape[2:]
    blocks = -(-n // block_size)
    if neighbors is not None and neighbors.shape != (blocks, blocks):
        raise ValueError(f"neighbors has shape {tuple(neighbors.shape)}, must be ({blocks}, {blocks})")
    # 1. Means, and how far tokens are from them.
    q_mean, q_spread = _mean_and_spread(query, block_size)
    k_mean, k_spread = _mean_and_spread(key, block_size)
    # 2. The share of each block, and of the text, by the means.
    z = q_mean @ k_mean.mT
    if text_key is None:
        p = (z * width**-0.5).softmax(-1)
    else:
        text = q_mean @ text_key.to(z.dtype).mT
        p = (torch.cat([z, text], -1) * width**-0.5).softmax(-1)
        p = torch.cat([p[..., :blocks] * block_size, p[..., blocks:].sum(-1, keepdim=True)], -1)
        p = p / p.sum(-1, keepdim=True)
    with torch.no_grad():
        # 3. The blocks that are seen.
        ordered, order = p.sort(-1, descending=True)
        enough = (ordered.cumsum(-1) <= p_remain).sum(-1, keepdim=True) + 1
        rank = torch.arange(p.shape[-1], device=p.device)
        chosen = (rank < enough.clamp(min=top_k)).expand_as(order)
        selected = torch.zeros_like(chosen).scatter(-1, order, chosen)[..., :blocks]
        if neighbors is not None:
            selected = selected | neighbors
        selected = selected.clone()
        selected[..., :first_blocks, :first_blocks] = True
        # 4. Dropped blocks whose mean tells too little.
        error = (q_spread @ k_mean.mT).abs() + (q_mean @ k_spread.mT).abs()
        kept = selected | ~(z.abs() > error)
    # 5. What the seen blocks have to carry: all but what is left to the means.
    visual = p[..., :blocks]
    pooled = visual.masked_fill(kept, 0)
    share = visual.masked_fill(~kept, 0).sum(-1) + p[..., blocks:].sum(-1)
    # All blocks stand in the index, the seen ones first: its width is then no matter of the data.
    index = (~selected).to(torch.uint8).argsort(dim=-1, stable=True)
    kind = torch.full_like(index, FULL, dtype=torch.uint8)
    table = BlockTable(selected.sum(-1), index, kind, (block_size, block_size), (n, n))
    return RectifiedBlocks(table, share, pooled)


def rectified_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    *,
    block_size: int = 128,
    top_k: int,
    p_remain: float = 0.3,
    neighbors: Bool[Tensor, "g g"] | None = None,
    first_blocks: int = 0,
    text: int = 0,
) -> Float[Tensor, "b h n e"]:
    """Attention over the selected blocks, times their share, plus dropped blocks by their mean values.

        out_i = share_I softmax over selected (q_i . k_j / sqrt(d)) v_j + sum_J pooled_IJ mean_J(v),  i in I

    query, key, value: tokens in an order that makes blocks of successive ones alike, e.g. a video's along
    `gilbert_order`, then `text` tokens. Text sees everything, and every query sees the text.
    Other arguments and errors: see `rectified_blocks`.
    Source: Rectified SpaAttn, arXiv 2511.19835.
    """
    n = query.shape[2] - text
    q, k, v = query[:, :, :n], key[:, :, :n], value[:, :, :n]
    found = rectified_blocks(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        p_remain=p_remain,
        neighbors=neighbors,
        first_blocks=first_blocks,
        text_key=key[:, :, n:] if text else None,
    )
    # 6. Seen tokens exactly, dropped blocks by their means.
    parts = [attention(q, k, v, pattern=found.table, return_lse=True)]
    if text:
        parts.append(attention(q, key[:, :, n:], value[:, :, n:], return_lse=True))
    seen, _ = merge_partials(parts)
    means = found.pooled @ _by_block(v, block_size).mean(3)
    share, means = (x.repeat_interleave(block_size, 2)[:, :, :n] for x in (found.share[..., None], means))
    out = (share * seen + means).to(query.dtype)
    # 7. Text sees all.
    return torch.cat([out, attention(query[:, :, n:], key, value)], dim=2) if text else out


def _by_block(x: Float[Tensor, "b h n d"], block_size: int) -> Float[Tensor, "b h g l d"]:
    """The tokens of each block, the last one filled up with zeros; in float32 at least."""
    x = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, -x.shape[2] % block_size))
    return x.unflatten(2, (-1, block_size))


def _mean_and_spread(
    x: Float[Tensor, "b h n d"], block_size: int
) -> tuple[Float[Tensor, "b h g d"], Float[Tensor, "b h g d"]]:
    """The mean of each block, and how far its tokens are from it, in the mean and channel by channel."""
    tokens = _by_block(x, block_size)
    mean = tokens.mean(3)
    with torch.no_grad():
        spread = (tokens - mean[:, :, :, None]).abs().mean(3)
    return mean, spread
