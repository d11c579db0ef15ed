"""The small model of Block Transformer that writes out one block of tokens."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_choice, check_positive
from heedful.models.neox import Made, NeoX
from heedful.models.sampling import sample

STRATEGIES = ("prefix", "summation")


class Expansion(nn.Module):
    """Each context vector (b, t, dim) to `ratio` vectors of the token decoder, (b, t ratio, token_dim)."""

    def __init__(
        self,
        dim: int,
        token_dim: int,
        *,
        ratio: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("ratio", ratio)
        self.ratio = ratio
        self.conv = nn.Conv1d(dim, ratio * token_dim, 1, device=device, dtype=dtype)
        nn.init.normal_(self.conv.weight, std=dim**-0.5)

    def forward(self, context: Float[Tensor, "b t c"]) -> Float[Tensor, "b tr d"]:
        return rearrange(self.conv(context.mT), "b (r d) t -> b (t r) d", r=self.ratio)


class TokenDecoder(nn.Module):
    """The tokens of one block, from the context vector of the blocks before it and nothing else.

        "prefix"     causal layers over [p_1 .. p_r, E[x_1] .. E[x_(l-1)]], p the expanded context
        "summation"  over [E[begin], E[x_1] .. E[x_(l-1)]] + p, with r = l

    The outputs from p_r on, or all of them, times a head of their own, are the logits of x_1 .. x_l.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        token_dim: int,
        *,
        block_length: int,
        depth: int,
        heads: int,
        expansion: int = 2,
        strategy: str = "prefix",
        rotary_share: float = 0.25,
        begin: int = 0,
        pad: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        check_choice("strategy", strategy, STRATEGIES)
        if strategy == "summation" and expansion != block_length:
            raise ValueError(f'expansion is {expansion}, must be {block_length} for strategy="summation"')
        self.block_length, self.strategy, self.begin = block_length, strategy, begin
        self.expansion = Expansion(dim, token_dim, ratio=expansion, **made)
        self.embedding = padded_embedding(vocabulary, token_dim, pad, **made)
        self.neox = NeoX(token_dim, depth=depth, heads=heads, rotary_share=rotary_share, **made)
        self.head = nn.Linear(token_dim, vocabulary, bias=False, **made)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, context: Float[Tensor, "b c"], ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Logits of each of the tokens ids, given those before it in the block."""
        start = self._start(context)
        x = self.embedding(ids[:, :-1])
        if self.strategy == "summation":
            x = x + self.expansion(context[:, None])[:, 1:]
        y, _ = self.neox(torch.cat([start, x], dim=1))
        return self.head(y[:, start.shape[1] - 1 :])

    def write(self, context: Float[Tensor, "b c"], **how: Any) -> Int[Tensor, "b l"]:
        """A block of tokens, one after the other with a cache of its own; how: see `sample`."""
        x, states, ids = self._start(context), None, []
        for i in range(self.block_length):
            y, states = self.neox(x, None, states)
            ids.append(sample(self.head(y[:, -1]), **how))
            x = self.embedding(ids[-1])[:, None]
            if self.strategy == "summation" and i + 1 < self.block_length:
                x = x + self.expansion(context[:, None])[:, i + 1 : i + 2]
        return torch.stack(ids, dim=1)

    def _start(self, context: Float[Tensor, "b c"]) -> Float[Tensor, "b r d"]:
        """What stands before the first token."""
        expanded = self.expansion(context[:, None])
        if self.strategy == "prefix":
            return expanded
        return expanded[:, :1] + self.embedding.weight[self.begin]


def padded_embedding(vocabulary: int, dim: int, pad: int | None, **made: Any) -> nn.Embedding:
    """An embedding that starts small, and at zero for the padding, which it does not train."""
    embedding = nn.Embedding(vocabulary, dim, padding_idx=pad, **made)
    nn.init.normal_(embedding.weight, std=0.02)
    if pad is not None:
        with torch.no_grad():
            embedding.weight[pad] = 0
    return embedding
