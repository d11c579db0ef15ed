"""Step-3: a decoder of multi-matrix factorization attention and a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_mask, check_positive, check_tokens
from heedful.mixers.heads.step3_mfa import MultiMatrixFactorizationAttention
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.models.decoder_lm import DecoderLM
from heedful.registry import register
from heedful.routing.head_gate import chosen, load_balance, wide_linear


class Step3Experts(nn.Module):
    """A SwiGLU that every token goes through, and the `topk` of `experts` others that it chooses.

        p = softmax(x W_router),  T = the topk largest,  y = shared(x) + sum_{e in T} w_e SwiGLU_e(x)

    with w = p, or p / sum_T p where `norm_expert_weight`. An expert computes the tokens that chose it alone.

    dim            channels of x and y
    experts, topk  how many there are, and how many a token takes
    hidden         inner width of an expert
    shared_hidden  inner width of the shared one
    norm_expert_weight  the weights of a token's experts sum to 1

    forward: x (b, n, c); mask (b, n), True = a token, says whom the loss counts and changes nothing else. In
    training aux_losses["load_balance"] tells how unevenly the experts are used (`topk` where evenly); it is
    not weighed. Choices are made in float32. Raises ValueError on numbers that are no sizes and wrong shapes.
    Source: Step-3, arXiv 2507.19427.
    """

    def __init__(
        self,
        dim: int,
        *,
        experts: int = 48,
        topk: int = 3,
        hidden: int,
        shared_hidden: int,
        norm_expert_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("experts", experts), ("topk", topk), ("expert_hidden", hidden)):
            check_positive(name, number)
        check_positive("shared_hidden", shared_hidden)
        if topk > experts:
            raise ValueError(f"topk is {topk}, must be at most experts, which is {experts}")
        self.dim, self.topk, self.norm_expert_weight = dim, topk, norm_expert_weight
        self.aux_losses: dict[str, Float[Tensor, ""]] = {}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(dim, experts, bias=False, **factory)
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim, **factory))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim, **factory))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden, **factory))
        self.shared = SwiGLU(dim, hidden=shared_hidden, **factory)
        for weight in (self.gate, self.up, self.down):  # as a linear layer starts
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        # 1. Each token's experts and their weights.
        p = wide_linear(x, self.router.weight).softmax(-1)
        taken = chosen(p, self.topk)
        weight = p * taken
        if self.norm_expert_weight:
            weight = weight / weight.sum(-1, keepdim=True)
        self.aux_losses = {"load_balance": load_balance(p, taken, mask)} if self.training else {}
        # 2. The shared expert on all tokens.
        y = self.shared(x).flatten(0, 1)
        # 3. Each other expert on its own; the results are added where they came from.
        flat, weight, taken = (t.flatten(0, 1) for t in (x, weight, taken))
        for e in range(len(self.gate)):
            rows = taken[:, e].nonzero()[:, 0]
            own = flat[rows]
            inner = F.silu(F.linear(own, self.gate[e])) * F.linear(own, self.up[e])
            part = weight[rows, e, None] * F.linear(inner, self.down[e])
            y = y.index_add(0, rows, part.to(y.dtype))
        return y.view_as(x)


class Step3Block(nn.Module):
    """x = x + mixer(RMS(x)),  x = x + mlp(RMS(x))

    mixer     any sequence mixer, in Step-3 a `MultiMatrixFactorizationAttention`
    mlp       a `SwiGLU` or `Step3Experts` of as many channels
    norm_eps  of both norms

    forward: x (b, n, c), mask (b, n) with True = a token; with the mixer's state x continues the sequence and
    (y, state) comes back. Source: Step-3, arXiv 2507.19427.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp: SwiGLU | Step3Experts,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp
        self.norm1 = nn.RMSNorm(mixer.dim, eps=norm_eps, device=device, dtype=dtype)
        self.norm2 = nn.RMSNorm(mixer.dim, eps=norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], State]:
        mixed = self.mixer(self.norm1(x), mask=mask, state=state)
        mixed, after = (mixed, None) if state is None else mixed
        x = x + mixed
        z = self.norm2(x)
        x = x + (self.mlp(z, mask=mask) if isinstance(self.mlp, Step3Experts) else self.mlp(z))
        return x if after is None else (x, after)


@register(
    "step3",
    kind="model",
    paper="step3-mfa",
    tags=("language model", "multi-query", "low-rank", "experts"),
    causal="always",
    decode=True,
)
class Step3LM(DecoderLM):
    """A causal language model of `Step3Block`s, with experts in the layers of `moe_layers`.

        x = E[ids];  blocks;  logits = RMS(x) W

    vocabulary, dim, depth, tied         as in `DecoderLM`
    heads, head_dim, query_rank          of the attention; query_rank None: head_dim
    rotary_base, norm_eps                of the attention and of all norms
    hidden                               inner width of the feed-forward net of the other layers
    experts, topk, expert_hidden, shared_hidden, norm_expert_weight   see `Step3Experts`
    moe_layers                           numbers of layers; None: all but layer 0

    The defaults are the published ones; published are moe_layers=range(4, 60), 316 G parameters. The model
    generates, saves and loads as `DecoderLM` does; `aux_losses` has the load balance of each layer with
    experts. Raises ValueError on numbers that are no sizes and on layers that are not there.
    Source: Step-3, arXiv 2507.19427.
    """

    example: ClassVar[dict[str, Any]] = {
        "vocabulary": 32,
        "dim": 16,
        "depth": 3,
        "heads": 4,
        "head_dim": 8,
        "query_rank": 12,
        "hidden": 24,
        "experts": 6,
        "expert_hidden": 10,
        "shared_hidden": 10,
    }

    def __init__(
        self,
        vocabulary: int = 128815,
        dim: int = 7168,
        *,
        depth: int = 61,
        heads: int = 64,
        head_dim: int = 256,
        query_rank: int | None = 2048,
        rotary_base: float = 500000.0,
        norm_eps: float = 1e-5,
        hidden: int = 18432,
        experts: int = 48,
        topk: int = 3,
        expert_hidden: int = 5120,
        shared_hidden: int = 5120,
        norm_expert_weight: bool = False,
        moe_layers: Sequence[int] | None = None,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the layers are of another kind than those that a Stack builds
        for name, number in (("vocabulary", vocabulary), ("dim", dim), ("depth", depth)):
            check_positive(name, number)
        sparse = [*range(1, depth)] if moe_layers is None else [*moe_layers]
        if outside := [i for i in sparse if i not in range(depth)]:
            raise ValueError(f"moe_layers has {outside[0]!r}, must have numbers of layers, 0 to {depth - 1}")
        self.vocabulary, self.dim = vocabulary, dim
        attention: dict[str, Any] = {
            "heads": heads,
            "head_dim": head_dim,
            "query_rank": head_dim if query_rank is None else query_rank,
            "rotary_base": rotary_base,
            "norm_eps": norm_eps,
        }
        mixture: dict[str, Any] = {
            "experts": experts,
            "topk": topk,
            "shared_hidden": shared_hidden,
            "norm_expert_weight": norm_expert_weight,
        }
        self.config = {  # what builds this model again
            "vocabulary": vocabulary,
            "dim": dim,
            "depth": depth,
            **attention,
            "hidden": hidden,
            **mixture,
            "expert_hidden": expert_hidden,
            "moe_layers": sparse,
            "tied": tied,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary, dim, **factory)
        self.layers = nn.ModuleList()
        for i in range(depth):
            mixer = MultiMatrixFactorizationAttention(dim, **attention, **factory)
            mlp = (
                Step3Experts(dim, hidden=expert_hidden, **mixture, **factory)
                if i in sparse
                else SwiGLU(dim, hidden=hidden, **factory)
            )
            self.layers.append(Step3Block(mixer, mlp, norm_eps=norm_eps, **factory))
        self.norm = nn.RMSNorm(dim, eps=norm_eps, **factory)
        self.head = None if tied else nn.Linear(dim, vocabulary, bias=False, **factory)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def aux_losses(self) -> dict[str, Float[Tensor, ""]]:
        """Those of the layers with experts after a training forward, as "layer.name"."""
        parts = ((i, layer.mlp) for i, layer in enumerate(self.layers))
        return {
            f"{i}.{name}": loss
            for i, part in parts
            if isinstance(part, Step3Experts)
            for name, loss in part.aux_losses.items()
        }
