"""Factors of an attention bias that small nets make from the tokens, trained to imitate a dense bias."""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive, check_tokens
from heedful.ops.bias import FactoredBias
from heedful.registry import register


@register("neural-bias", kind="bias", paper="flashbias", tags=("bias", "low-rank"), complexity="O((N + M) C)")
class NeuralBias(nn.Module):
    """A bias of low rank whose factors are nets of the query's and of the key's token.

        B_ij = phi_q(x_i) . phi_k(z_j) a head,   phi(x) = W_3 tanh(W_2 tanh(W_1 x)),   no biases

    dim     channels of the tokens
    heads   heads of the attention
    rank    numbers a token and head; the width of heads grows by it
    hidden  channels inside the nets

    forward gives a `FactoredBias` for `heedful.attention`. To replace a bias that costs an n x m table, such
    as that of AlphaFold 3's triangle attention, train it with `imitation_loss` on tokens such as
    `pair_tokens` gives, with all else frozen.
    Raises ValueError on sizes below 1 and on tokens of another width. Source: FlashBias, arXiv 2505.12044.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        rank: int = 96,
        hidden: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("rank", rank), ("hidden", hidden)):
            check_positive(name, value)
        self.dim, self.heads = dim, heads

        def net() -> nn.Sequential:
            widths = (dim, hidden, hidden, heads * rank)
            layers = [nn.Linear(a, b, bias=False, device=device, dtype=dtype) for a, b in pairwise(widths)]
            for layer in layers:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

        self.query, self.key = net(), net()

    def forward(
        self, query_tokens: Float[Tensor, "b n c"], key_tokens: Float[Tensor, "b2 m c"]
    ) -> FactoredBias:
        check_tokens("query_tokens", query_tokens, self.dim)
        check_tokens("key_tokens", key_tokens, self.dim)
        query, key = (
            rearrange(net(x), "b n (h r) -> b h n r", h=self.heads)
            for net, x in ((self.query, query_tokens), (self.key, key_tokens))
        )
        return FactoredBias(query, key)


def imitation_loss(bias: FactoredBias, wanted: Float[Tensor, "#b #h n m"]) -> Float[Tensor, ""]:
    """Mean square difference from the dense bias; holds an n x m table, as `wanted` does."""
    return (bias.dense() - wanted).square().mean()


def pair_tokens(
    pair: Float[Tensor, "b n m c"],
    query_single: Float[Tensor, "b n s"],
    key_single: Float[Tensor, "b m s"],
) -> tuple[Float[Tensor, "b n cs"], Float[Tensor, "b m cs"]]:
    """Tokens of a pair representation: its means over the other side, beside what is known of each token."""
    return (
        torch.cat([pair.mean(2), query_single], dim=-1),
        torch.cat([pair.mean(1), key_single], dim=-1),
    )
