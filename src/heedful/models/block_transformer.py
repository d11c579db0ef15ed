"""Block Transformer: a model over blocks of tokens, and a small one that writes the next block out."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_choice, check_divides, check_mask, check_positive
from heedful.models.neox import Made, NeoX
from heedful.models.stack import IGNORED
from heedful.models.token_decoder import TokenDecoder, padded_embedding
from heedful.registry import register

PROJECTIONS = ("concat", "conv")


class BlockOutput(NamedTuple):
    """logits[:, t] are those of the tokens of block t + 1; the first block is never predicted."""

    logits: Float[Tensor, "b blocks l v"]
    loss: Float[Tensor, ""] | None = None


class BlockEmbedder(nn.Module):
    """Blocks of ids (b, l) to `tokens` vectors each, (b, tokens, dim).

    "concat": the embeddings of l / tokens neighbours side by side; "conv": a convolution over as many, from
    embeddings of `hidden` channels.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        block_length: int = 4,
        tokens: int = 1,
        projection: str = "concat",
        hidden: int | None = None,
        pad: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        check_divides("tokens", tokens, "block_length", block_length)
        check_choice("projection", projection, PROJECTIONS)
        self.together = block_length // tokens
        if projection == "concat":
            check_divides("block_length / tokens", self.together, "dim", dim)
            hidden = dim // self.together
        elif hidden is None:
            raise ValueError('hidden is None, must be given for projection="conv"')
        self.embedding = padded_embedding(vocabulary, hidden, pad, **made)
        self.projection = None
        if projection == "conv":
            self.projection = nn.Conv1d(hidden, dim, self.together, stride=self.together, **made)
            nn.init.normal_(self.projection.weight, std=(hidden * block_length) ** -0.5)

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b t c"]:
        x = self.embedding(ids)
        if self.projection is None:
            return rearrange(x, "b (t l) c -> b t (l c)", l=self.together)
        return self.projection(x.mT).mT


@register(
    "block-transformer",
    kind="model",
    paper="block-transformer",
    tags=("language model", "blocks"),
    causal="always",
    decode=True,
    complexity="O((N / l)^2 C) in the blocks, O(N l C) in the tokens",
)
class BlockTransformer(nn.Module):
    """A causal language model that sees far in blocks and near in tokens.

        c_t = block decoder(embedder(block 1), .., embedder(block t))           causal over blocks
        p(block t + 1) = product_i token decoder(c_t, x_1 .. x_(i-1))           causal inside the block

    vocabulary    tokens
    dim           channels of the block decoder; block_length divides it
    block_length  tokens a block
    depth, heads  of the block decoder
    token_dim, token_depth, token_heads   of the token decoder; None: as the block decoder
    expansion     vectors that the token decoder gets of one context
    strategy      "prefix" or "summation", see `TokenDecoder`
    rotary_share  of the channels of a head
    pad           the id that fills up the first block; its embeddings start at zero
    begin         the id before the first token of a block, for "summation"

    forward: ids (b, n), filled up on the left with `pad` to whole blocks; mask (b, n), False = padding, on
    the left; labels (b, n), usually the ids: the loss is the mean cross entropy of the tokens of all blocks
    but a row's first, -100 and padding left out. `random_start` shifts rows so that all tokens are trained.
    Raises ValueError on wrong shapes and sizes that do not divide.
    Source: Block Transformer, arXiv 2406.02657.
    """

    example: ClassVar[dict[str, Any]] = {"vocabulary": 32, "dim": 32, "depth": 2, "heads": 4}

    def __init__(
        self,
        vocabulary: int,
        dim: int = 512,
        *,
        block_length: int = 4,
        depth: int = 3,
        heads: int = 8,
        token_dim: int | None = None,
        token_depth: int | None = None,
        token_heads: int | None = None,
        expansion: int = 2,
        strategy: str = "prefix",
        rotary_share: float = 0.25,
        pad: int = 0,
        begin: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        self.vocabulary, self.block_length, self.pad = vocabulary, block_length, pad
        self.embedder = BlockEmbedder(vocabulary, dim, block_length=block_length, pad=pad, **made)
        self.block_decoder = NeoX(dim, depth=depth, heads=heads, rotary_share=rotary_share, **made)
        self.token_decoder = TokenDecoder(
            vocabulary,
            dim,
            token_dim or dim,
            block_length=block_length,
            depth=token_depth or depth,
            heads=token_heads or heads,
            expansion=expansion,
            strategy=strategy,
            rotary_share=rotary_share,
            begin=begin,
            pad=pad,
            **made,
        )

    def example_inputs(self, *, batch: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(self.vocabulary, (batch, length), generator=generator)}

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
    ) -> BlockOutput:
        ids, mask, fill = self._whole_blocks(ids, mask)
        blocks = rearrange(ids, "b (t l) -> b t l", l=self.block_length)
        seen = rearrange(mask, "b (t l) -> b t l", l=self.block_length)
        # 1, 2. Blocks to vectors, and those to the contexts of the blocks behind them.
        context, _ = self.block_decoder(self._embed(blocks), seen.any(-1))
        # 3. Every block by itself.
        logits = self.token_decoder(context[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(0, 1))
        logits = logits.unflatten(0, (len(ids), blocks.shape[1] - 1))
        if labels is None:
            return BlockOutput(logits)
        if labels.shape != (len(ids), ids.shape[1] - fill):
            raise ValueError(f"labels has shape {tuple(labels.shape)}, must be that of the ids")
        # 4. What has no real block before it is a first block, which nothing predicts.
        wanted = F.pad(labels, (fill, 0), value=IGNORED).unflatten(1, (-1, self.block_length))[:, 1:]
        counts = seen[:, 1:] & seen[:, :-1].any(-1)[..., None] & (wanted != IGNORED)
        total = F.cross_entropy(logits[counts].float(), wanted[counts], reduction="sum")
        return BlockOutput(logits, total / counts.sum().clamp(min=1))

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b m"]:
        """The ids continued, a block at a time; the keys and values of past blocks are kept, not of tokens.

        temperature, top_k, top_p   see `heedful.models.sampling.sample`
        eos    a row that gives this token is finished and filled with it; all finished ends it early
        mask   False = padding, on the left
        """
        check_positive("max_new_tokens", max_new_tokens)
        if ids.shape[1] == 0:
            raise ValueError("ids has no tokens, must have at least 1 to continue")
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        first, mask, _ = self._whole_blocks(ids, mask)
        blocks = rearrange(first, "b (t l) -> b t l", l=self.block_length)
        seen = rearrange(mask, "b (t l) -> b t l", l=self.block_length).any(-1)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        length, states = ids.shape[1] + max_new_tokens, None
        while ids.shape[1] < length and not finished.all():
            context, states = self.block_decoder(self._embed(blocks), seen, states)
            block = self.token_decoder.write(context[:, -1], **how)
            if eos is not None:
                ended = (block == eos).cumsum(1) > 0
                block = block.masked_fill(ended | finished[:, None], eos)
                finished = finished | ended[:, -1]
            ids = torch.cat([ids, block], dim=1)
            blocks, seen = block[:, None], torch.ones_like(seen[:, :1])
        return ids[:, :length]

    def random_start(
        self, ids: Int[Tensor, "b n"], generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Rows behind 0 to block_length - 1 pads, cut at their end to the length they had, and the mask."""
        by = torch.randint(self.block_length, (len(ids), 1), generator=generator).to(ids.device)
        place = torch.arange(ids.shape[1], device=ids.device) - by
        return ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, self.pad), place >= 0

    def _embed(self, blocks: Int[Tensor, "b t l"]) -> Float[Tensor, "b t c"]:
        return self.embedder(blocks.flatten(0, 1))[:, 0].unflatten(0, blocks.shape[:2])

    def _whole_blocks(
        self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"], int]:
        """Ids and mask with pads on the left until all blocks are whole, and how many."""
        if ids.ndim != 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, must be (batch, tokens)")
        check_mask("mask", mask, ids.shape[0], ids.shape[1])
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if not mask.int().diff(dim=1).ge(0).all():
            raise ValueError("mask hides tokens behind others, must have padding on the left only")
        fill = -ids.shape[1] % self.block_length
        ids = ids.masked_fill(~mask, self.pad)
        return F.pad(ids, (fill, 0), value=self.pad), F.pad(mask, (fill, 0), value=False), fill
