"""What the page shows of a sample: tables of weights as bytes, what tokens receive, what reaches the top."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from heedful.inspect.head_profile import HeadProfile
from heedful.inspect.rollout import rollout_responses
from heedful.inspect.sample import Sample
from heedful.inspect.site import Site

SHOWN = 48  # tokens of a text whose tables are kept for the page
ROLLED = 2048  # tokens of a sample up to which the rollout is made


@dataclass
class View:
    """What of a sample the page shows: tables of weights, (heads, rows, columns) in 1/255."""

    sample: Sample
    tables: np.ndarray
    received: np.ndarray  # (layers, m), the mean over heads
    rollout: np.ndarray | None  # (m,) the share of each token in the output


class Tables:
    """Keeps the tables of a sample's heads for the page, as bytes, of as many tokens as are shown."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.tables: dict[tuple[int, str], np.ndarray] = {}
        self.sites: list[Site] = []

    @property
    def entries(self) -> int:
        return sum(t.size for t in self.tables.values())

    def __call__(self, site: Site) -> None:
        b, _, n, m = site.shape
        if site.cross or b != 1 or n != m or m != len(self.sample):
            return
        if self.sample.grid is None:
            shown = min(SHOWN, m)
            weights = site.weights(slice(0, shown))[0, :, :, :shown].float()
        else:
            weights = _pooled_rows(site.weights()[0].float(), self.sample)
        self.tables[site.layer, site.name] = (weights * 255).round().byte().cpu().numpy()
        if m <= ROLLED:
            self.sites.append(site)

    def view(self, profile: HeadProfile) -> View:
        places = sorted(self.tables)
        layers = sorted({layer for layer, _ in places})
        received = [
            torch.cat([profile.received[p] for p in places if p[0] == layer]).mean(0).numpy()
            for layer in layers
        ]
        reach = None
        if self.sites:
            causal = not bool(self.sites[-1].visible(slice(0, 1))[0, 0, 0, -1])
            reads = self.sample.reads or (slice(-1, None) if causal else slice(None))
            reach = rollout_responses(self.sites, token=reads)[0].cpu().numpy()
        return View(self.sample, np.concatenate([self.tables[p] for p in places]), np.stack(received), reach)


def _pooled_rows(weights: Tensor, sample: Sample) -> Tensor:
    """Rows of patches, joined to at most 8 x 8 blocks; columns stay."""
    assert sample.grid is not None
    height, width = sample.grid
    step = max(1, -(-max(height, width) // 8))
    patches = weights[:, sample.prefix :].transpose(1, 2).unflatten(2, sample.grid)
    joined = nn.functional.avg_pool2d(patches, step, ceil_mode=True, count_include_pad=False)
    return torch.cat([weights[:, : sample.prefix], joined.flatten(2).transpose(1, 2)], dim=1)
