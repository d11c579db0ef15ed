"""The selective state space (S6) along several routes at once, as the vision Mambas use it inside."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.ops.precision import no_autocast
from heedful.ops.scan import selective_scan


class SelectiveSSM(nn.Module):
    """A selective scan whose step, input and output maps come from the token; each route has its own weights.

        r, B, C = W_read u,  delta = softplus(W_step r + b),  A = -exp(log_rate)
        h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t,   y_t = C_t . h_t + D u_t

    dim        channels of u
    routes     number of sequences that are scanned side by side
    state_dim  numbers of state a channel
    rank       channels of r; None: ceil(dim / 16)

    Runs in float32 at least. A starts at -1 .. -state_dim, D (`skip`) at 1, and b such that steps lie in
    (0.001, 0.1). Raises ValueError unless all are at least 1.
    Sources: Mamba, arXiv 2312.00752; routes: VMamba, arXiv 2401.10166.
    """

    def __init__(
        self,
        dim: int,
        *,
        routes: int,
        state_dim: int = 16,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if rank is None else rank
        for name, value in (("dim", dim), ("routes", routes), ("state_dim", state_dim), ("rank", rank)):
            check_positive(name, value)
        self.dim, self.routes, self.state_dim, self.rank = dim, routes, state_dim, rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(routes, *shape, device=device, dtype=dtype))

        self.read = empty(rank + 2 * state_dim, dim)
        self.step = empty(dim, rank)
        self.step_bias = empty(dim)
        self.log_rate = empty(dim, state_dim)
        self.skip = empty(dim)
        with torch.no_grad():
            self.read.uniform_(-(dim**-0.5), dim**-0.5)
            self.step.uniform_(-(rank**-0.5), rank**-0.5)
            step = torch.empty_like(self.step_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            self.log_rate.copy_(torch.arange(1, state_dim + 1).log())
            self.skip.fill_(1)
        for parameter in (self.log_rate, self.skip):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        u: Float[Tensor, "b routes d n"],
        *,
        state: Float[Tensor, "b rd s"] | None = None,
        return_state: bool = False,
    ) -> Float[Tensor, "b routes d n"] | tuple[Float[Tensor, "b routes d n"], Float[Tensor, "b rd s"]]:
        """Every route from its state (None: nothing) to its last token; float32, or float64 if u is."""
        with no_autocast(u):
            u = u.to(torch.promote_types(u.dtype, torch.float32))
            step, B, C = self._given(u)
            y, state = self._scan(u, step, B, C, self.skip.flatten(), state)
        return (y, state) if return_state else y

    def hidden(self, u: Float[Tensor, "b routes d n"]) -> tuple[Tensor, Tensor]:
        """The states h (b, routes, d, n) and the C (b, routes, 1, n) to read them, if state_dim is 1."""
        if self.state_dim != 1:
            raise ValueError(f"state_dim is {self.state_dim}, must be 1 to give the states themselves")
        with no_autocast(u):
            u = u.to(torch.promote_types(u.dtype, torch.float32))
            step, B, C = self._given(u)
            return self._scan(u, step, B, torch.ones_like(C), None, None)[0], C

    def _given(self, u: Tensor) -> tuple[Tensor, ...]:
        """What the tokens give: the steps (before bias and softplus), B and C."""
        r, B, C = (self.read.to(u.dtype) @ u).split([self.rank, self.state_dim, self.state_dim], dim=2)
        return self.step.to(u.dtype) @ r, B, C

    def _scan(
        self, u: Tensor, step: Tensor, B: Tensor, C: Tensor, skip: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(
            u.flatten(1, 2),
            step.flatten(1, 2),
            -self.log_rate.to(u.dtype).exp().flatten(0, 1),
            B,
            C,
            skip,
            delta_bias=self.step_bias.flatten(),
            delta_softplus=True,
            state=state,
            return_state=True,
        )
        return y.unflatten(1, (self.routes, self.dim)), state
