"""The pre-norm Transformer block: one mixer, one feed-forward part, each residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_positive
from heedful.mixers.heads.polynorm import PolyNormGLU
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State

NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu", "polynorm")


def make_norm(
    kind: str, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A normalisation of the channels: "rms" or "layer", both with eps 1e-6."""
    check_choice("norm", kind, NORMS)
    if kind == "rms":
        return nn.RMSNorm(dim, eps=1e-6, device=device, dtype=dtype)
    return nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)


class GELU(nn.Module):
    """y = gelu(x W_wide + b) W_narrow + b', with the exact GELU; hidden: inner width."""

    def __init__(
        self,
        dim: int,
        *,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("hidden", hidden)
        self.wide = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.narrow = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.narrow(F.gelu(self.wide(x)))


class Block(nn.Module):
    """x = x + mixer(norm(x)),  x = x + mlp(norm(x))

    mixer   any sequence mixer
    mlp     "swiglu", "gelu" or "polynorm" (`PolyNormGLU`);  hidden: its inner width, None: the usual one
    norm    "rms" or "layer"

    forward: x (b, n, c), mask (b, n) with True = a token; with the mixer's state x continues the sequence and
    (y, state) comes back.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        mlp: str = "swiglu",
        hidden: int | None = None,
        norm: str = "rms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("mlp", mlp, MLPS)
        self.mixer = mixer
        self.norm1 = make_norm(norm, mixer.dim, device=device, dtype=dtype)
        self.norm2 = make_norm(norm, mixer.dim, device=device, dtype=dtype)
        dim = mixer.dim
        if mlp == "gelu":
            inner = 4 * dim if hidden is None else hidden
            self.mlp: nn.Module = GELU(dim, hidden=inner, device=device, dtype=dtype)
        else:  # two thirds of 4 dim, since they have three matrices; a multiple of 8
            inner = -(-dim // 3) * 8 if hidden is None else hidden
            made = SwiGLU if mlp == "swiglu" else PolyNormGLU
            self.mlp = made(dim, hidden=inner, device=device, dtype=dtype)

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
        x = x + self.mlp(self.norm2(x))
        return x if after is None else (x, after)
