"""The parts of FIT: layers inside groups of tokens, layers over latents, and attention between the two."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.state import KVState
from heedful.models.block import Block, make_norm
from heedful.ops.attention import attention
from heedful.patterns.causal import Causal
from heedful.patterns.local_blocks import LocalBlocks

Made = dict[str, Any]  # device and dtype


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """Local and global layers of each stage: "(2)4(1)" is [(2, 4), (1, 0)].

    Raises ValueError unless it is written so, with global layers in every stage but the last.
    """
    if not re.fullmatch(r"(\(\d+\)\d+)*\(\d+\)\d*", layers):
        raise ValueError(f"layers is {layers!r}, must be written like '(2)4(2)4(2)'")
    pairs = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", layers)]
    if any(b == 0 for _, b in pairs[:-1]):
        raise ValueError(f"layers is {layers!r}, must have global layers in every stage but the last")
    return pairs


class Layers(nn.Module):
    """Pre-norm Transformer layers with LayerNorm and GELU; with states, x continues what they hold."""

    def __init__(self, dim: int, *, depth: int, heads: int, mlp_ratio: int, see: str, made: Made) -> None:
        super().__init__()
        own = see == "before"
        pattern = None if see in ("all", "before") else Causal() | LocalBlocks(int(see), 0)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(dim, heads=heads, causal=own, pattern=pattern, **made),
                mlp="gelu",
                hidden=mlp_ratio * dim,
                norm="layer",
                **made,
            )
            for _ in range(depth)
        )

    def forward(
        self, x: Float[Tensor, "b n c"], states: tuple[KVState, ...] | None = None
    ) -> tuple[Float[Tensor, "b n c"], tuple[KVState, ...]]:
        after = []
        for i, block in enumerate(self.blocks):
            if states is None:
                x = block(x)
            else:
                x, state = block(x, state=states[i])
                after.append(state)
        return x, tuple(after)

    def start(self) -> tuple[KVState, ...]:
        return tuple(KVState() for _ in self.blocks)


class CrossAttention(nn.Module):
    """x + W_o attention(norm(x) W_q, norm'(s) W_k, norm'(s) W_v), x and s of any widths, without an MLP."""

    def __init__(self, dim: int, source_dim: int, *, heads: int, made: Made) -> None:
        super().__init__()
        check_divides("heads", heads, "the narrower of dim and latent_dim", min(dim, source_dim))
        inner = min(dim, source_dim)
        self.heads = heads
        self.norm, self.source_norm = (make_norm("layer", d, **made) for d in (dim, source_dim))
        self.query = nn.Linear(dim, inner, **made)
        self.key, self.value = nn.Linear(source_dim, inner, **made), nn.Linear(source_dim, inner, **made)
        self.out = nn.Linear(inner, dim, **made)

    def forward(self, x: Float[Tensor, "b n c"], source: Float[Tensor, "b m d"]) -> Float[Tensor, "b n c"]:
        source = self.source_norm(source)
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.query(self.norm(x)), self.key(source), self.value(source))
        )
        return x + self.out(rearrange(attention(query, key, value), "b h n d -> b n (h d)"))


@dataclass(frozen=True)
class StageState:
    """What a stage keeps: local keys and values and outputs of the open group, global keys and values of
    the latents so far, and the latents of the group before, which the open group reads."""

    local: tuple[KVState, ...]
    overall: tuple[KVState, ...]
    opened: Float[Tensor, "b n c"] | None = None
    before: Float[Tensor, "b m d"] | None = None


class Stage(nn.Module):
    """Local layers, latents read their group, global layers, and the groups read their latents.

    written      whether the groups read the latents (all stages but the last)
    conditioned  whether all latents read tokens that are given, before the global layers
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        *,
        depth: tuple[int, int],
        latents: int,
        heads: int,
        latent_heads: int,
        mlp_ratio: int,
        causal: bool,
        local_causal: bool,
        written: bool,
        conditioned: bool,
        made: Made,
    ) -> None:
        super().__init__()
        check_positive("latents", latents)
        both = min(heads, latent_heads)
        self.local = Layers(
            dim,
            depth=depth[0],
            heads=heads,
            mlp_ratio=mlp_ratio,
            see="before" if local_causal else "all",
            made=made,
        )
        self.read = self.overall = self.write = self.condition = None
        if depth[1]:
            self.read = CrossAttention(latent_dim, dim, heads=both, made=made)
            self.overall = Layers(
                latent_dim,
                depth=depth[1],
                heads=latent_heads,
                mlp_ratio=mlp_ratio,
                see=str(latents) if causal else "all",
                made=made,
            )
            if conditioned:
                self.condition = CrossAttention(latent_dim, latent_dim, heads=latent_heads, made=made)
        if written:
            self.write = CrossAttention(dim, latent_dim, heads=both, made=made)
        self.local_causal = local_causal

    def forward(
        self,
        x: Float[Tensor, "b t n c"],
        latents: Float[Tensor, "b t m d"],
        given: Float[Tensor, "b k d"] | None = None,
    ) -> tuple[Float[Tensor, "b t n c"], Float[Tensor, "b t m d"]]:
        b, t = x.shape[:2]
        x = self.local(x.flatten(0, 1))[0]
        if self.read is not None and self.overall is not None:
            latents = self.read(latents.flatten(0, 1), x)
            latents = rearrange(latents, "(b t) m d -> b (t m) d", b=b)
            if self.condition is not None:
                latents = self.condition(latents, given)
            latents = rearrange(self.overall(latents)[0], "b (t m) d -> b t m d", t=t)
        if self.write is not None:
            own = latents
            if self.local_causal:  # a group reads the group before it, the first one zeros
                own = torch.cat([torch.zeros_like(latents[:, :1]), latents[:, :-1]], dim=1)
            x = self.write(x, own.flatten(0, 1))
        return x.unflatten(0, (b, t)), latents

    def start(self) -> StageState:
        return StageState(self.local.start(), () if self.overall is None else self.overall.start())

    def extend(
        self, x: Float[Tensor, "b n c"], state: StageState, shape: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n c"], StageState]:
        """Some more tokens of the open group; shape: of one group's latents."""
        x, local = self.local(x, state.local)
        opened = x if state.opened is None else torch.cat([state.opened, x], dim=1)
        if self.write is not None:
            before = x.new_zeros(len(x), *shape) if state.before is None else state.before
            x = self.write(x, before)
        return x, StageState(local, state.overall, opened, state.before)

    def close(
        self, latents: Float[Tensor, "b m d"], state: StageState
    ) -> tuple[Float[Tensor, "b m d"], StageState]:
        """The latents of the open group, which is whole, behind this stage; the next group opens."""
        overall = state.overall
        if self.read is not None and self.overall is not None:
            assert state.opened is not None
            latents, overall = self.overall(self.read(latents, state.opened), overall)
        return latents, StageState(self.local.start(), overall, None, latents)
