"""Attention and feed-forward nets on groups of devices of their own: what batches and networks that takes.

A layer passes three stages in a pipeline: attention, transfer, FFN. Each has a third of the time of a token.
Source: Step-3, arXiv 2507.19427.
"""

from __future__ import annotations

from heedful.bench.decode_cost import Device

TOKEN_SECONDS = 50e-3
STAGES = 3


def dense_batch(device: Device) -> float:
    """The least batch at which a dense FFN is bound by arithmetic: 2 B >= FLOP/s / bytes/s.

    A weight is read once, in FP8, for a multiply-add of every row.
    """
    return device.flops / device.bandwidth / 2


def moe_batch(device: Device, share: float) -> float:
    """The same for a mixture of experts of which a token takes `share`: B = `dense_batch` / share.

    ValueError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}, must be above 0 and at most 1")
    return dense_batch(device) / share


def transfer_bytes(dim: int, batch: float) -> float:
    """Bytes that a layer moves between the groups, 3 dim B: rows of `dim` go in FP8 and come back in BF16."""
    return 3 * dim * batch


def least_share(
    device: Device,
    *,
    dim: int,
    layers: int,
    network: float,
    seconds: float = TOKEN_SECONDS / STAGES,
) -> float:
    """The least share of experts whose transfers still fit, 3 dim B_dense layers / (network seconds).

    dim, layers  of the model;  network  bytes/s of the group of FFN devices;  seconds  for all transfers of a
    token, by default a third of 50 ms. Fewer experts a token ask for a batch that the network cannot bring.
    """
    return transfer_bytes(dim, dense_batch(device)) * layers / (network * seconds)


# Bytes/s of a server of eight devices, with a card of 400 or 200 Gbit/s each. The speeds are ours: with them
# `least_share` gives the paper's bounds.
NETWORKS = {"H800": 4e11, "H20": 4e11, "A800": 2e11, "Ascend 910B": 2e11}
