"""Maps of heads sorted by their looks: an autoencoder's codes, two coordinates to draw, and clusters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.registry import register


class MapAutoencoder(nn.Module):
    """A convolutional autoencoder of square maps: four steps down of stride 2, a code, the same way up.

    Maps of any size are divided by their largest entry and brought to `size` x `size` first.
    """

    def __init__(self, *, size: int = 64, latent: int = 32) -> None:
        super().__init__()
        if size % 16:
            raise ValueError(f"size is {size}, must be a multiple of 16")
        self.size = size
        widths, side = (1, 16, 32, 64, 64), size // 16
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            down += [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()]
            up = [nn.ConvTranspose2d(b, a, 4, 2, 1), *([nn.ReLU()] if a > 1 else []), *up]
        self.encode = nn.Sequential(*down, nn.Flatten(), nn.Linear(64 * side * side, latent))
        self.decode = nn.Sequential(
            nn.Linear(latent, 64 * side * side), nn.Unflatten(1, (64, side, side)), *up
        )

    def prepare(self, maps: Float[Tensor, "b n m"]) -> Float[Tensor, "b 1 size size"]:
        """What the autoencoder is to reproduce."""
        scaled = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        return F.interpolate(scaled[:, None], (self.size, self.size), mode="area")

    def forward(self, x: Float[Tensor, "b 1 size size"]) -> Float[Tensor, "b 1 size size"]:
        return self.decode(self.encode(x))


@dataclass(frozen=True, eq=False)
class PatternEmbedding:
    """codes (maps, latent), their two first principal components, the cluster of each map, and what the
    maps of a cluster look like on average; error is the mean square of reconstruction.
    """

    codes: Float[Tensor, "maps latent"]
    places: Float[Tensor, "maps 2"]
    cluster: Int[Tensor, " maps"]
    means: Float[Tensor, "clusters size size"]
    error: float


@register(
    "attention-pattern-embedding", kind="inspect", paper="vit-visual-analytics", tags=("heads", "clusters")
)
def embed_patterns(
    maps: Float[Tensor, "maps n m"],
    *,
    clusters: int = 8,
    latent: int = 32,
    size: int = 64,
    steps: int = 300,
    seed: int = 0,
) -> PatternEmbedding:
    """Train an autoencoder on attention maps, of patches to patches, and group them by its codes.

    maps      of heads, layers and inputs, in any order
    clusters  of k-means on the codes, begun at codes far from each other
    steps     of Adam on batches of 64, learning rate 1e-3, on the mean square error

    The global random state is left alone. Source: arXiv 2303.13731; architecture and training are ours.
    """
    check_positive("clusters", clusters)
    if len(maps) < clusters:
        raise ValueError(f"clusters is {clusters}, must be at most the number of maps, {len(maps)}")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = MapAutoencoder(size=size, latent=latent).to(maps.device)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        x = model.prepare(maps.detach().float())
        for _ in range(steps):
            batch = x[torch.randint(len(x), (min(64, len(x)),)).to(x.device)]
            optimiser.zero_grad()
            F.mse_loss(model(batch), batch).backward()
            optimiser.step()
    with torch.no_grad():
        codes = model.encode(x)
        error = float(F.mse_loss(model.decode(codes), x))
        centred = codes - codes.mean(0)
        places = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        cluster = _k_means(codes, clusters)
        means = torch.stack([x[cluster == c, 0].mean(0) for c in range(clusters)])
    return PatternEmbedding(codes, places, cluster, means, error)


def _k_means(codes: Float[Tensor, "n c"], clusters: int) -> Int[Tensor, " n"]:
    centres = [codes[(codes - codes.mean(0)).norm(dim=1).argmax()]]
    while len(centres) < clusters:
        centres.append(codes[torch.cdist(codes, torch.stack(centres)).amin(1).argmax()])
    middle = torch.stack(centres)
    cluster = torch.cdist(codes, middle).argmin(1)
    for _ in range(100):
        for c in range(clusters):
            own = codes[cluster == c]
            if len(own):
                middle[c] = own.mean(0)
        again = torch.cdist(codes, middle).argmin(1)
        if torch.equal(again, cluster):
            break
        cluster = again
    return cluster
