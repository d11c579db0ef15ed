"""In-context linear regression: the authors' layer and their estimators."""

from __future__ import annotations

from typing import Any

import torch

from heedful.bench import icl
from tests.parity.harness import Tensors, adapter

NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}


@adapter("icl-linear-attention")
def icl_linear_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    layer = icl.ICLAttention(config["n_embd"], heads=config["n_head"], out=config["n_out"]).eval()
    layer.load_state_dict({f"{NAMES[k.split('.')[0]]}.weight": a for k, a in params.items()}, strict=True)
    told = config["TFEst"]
    task = icl.LinearRegression(told["d"], told["L"], told["var"])
    omega = inputs["omega"]
    x, y, x_query = inputs["X"].T, inputs["Y"], inputs["x_q"]  # the authors' samples are columns
    mu = icl.optimal_mu(omega, task)
    rate = 2 * 0.1 * 2.0  # of heads (omega, mu) = (0.1, 2) and (-0.1, -2)
    risk = icl.ridge_risk(0.1, 8)
    return {
        "y": layer(inputs["z_q"], inputs["z"]),
        "mu_opt": mu,
        "loss_tilde": icl.approximate_loss(omega, mu, task),
        "tf_est": icl.softmax_estimate(x, y, x_query, omega, mu),
        "gd": icl.gradient_step(x, y, x_query, rate=rate),
        "dgd": icl.gradient_step(x, y, x_query, rate=rate, debiased=True),
        "ridge": icl.ridge(x, y, x_query, noise=task.noise),
        "ridge_loss_var0.1_xi8": torch.tensor(risk, dtype=torch.float64),
    }
