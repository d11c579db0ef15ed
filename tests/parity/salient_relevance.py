"""Layer-wise relevance propagation through a small CNN."""

from __future__ import annotations

from typing import Any

from torch import nn

from heedful.inspect import lrp_cnn
from tests.parity.harness import Tensors, adapter


@adapter("lrp-cnn")
def lrp(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )
    net.load_state_dict(params)
    logits, relevance = lrp_cnn(net, inputs["x"])
    return {"logits": logits, "relevance": relevance}
