"""Pictures as samples: reading them, and finding out how a model cuts them into patches."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from heedful.inspect.capture import capture
from heedful.inspect.sample import Sample
from heedful.inspect.site import Site

MOST_BEFORE = 16  # class and register tokens


def pictures(files: Sequence[Path]) -> list[tuple[Image.Image, str]]:
    """Pictures and their names; without files scikit-learn's two photographs, else one of matplotlib's."""
    if files:
        found = []
        for file in files:
            try:
                found.append((Image.open(file).convert("RGB"), file.name))
            except (OSError, UnidentifiedImageError) as wrong:
                raise ValueError(
                    f"{file} cannot be read as an image: {str(wrong).splitlines()[0]}"
                ) from wrong
        return found
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        import matplotlib

        file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        return [(Image.open(file).convert("RGB"), file.name)]
    photographs = load_sample_images()
    names = [Path(str(file)).name for file in photographs.filenames]
    return [(Image.fromarray(x), name) for x, name in zip(photographs.images, names, strict=True)]


def image_sample(
    pixels: Float[Tensor, "1 3 height width"],
    *,
    model: nn.Module,
    patch: int | None = None,
    title: str = "image",
    mean: Sequence[float] | None = None,
    deviation: Sequence[float] | None = None,
) -> Sample:
    """A sample from pixels, which the model cuts into patches and attends over.

    patch      their side in pixels; None: what fits the most attention layers, by a run, as models of several
               stages have maps of several sizes
    mean, deviation   of the colours that were subtracted and divided by, to show the picture as it was;
               None: it is shown stretched to the full range of brightness

    How many tokens the model puts before the patches is found by the run.
    Raises ValueError if it has no self-attention over all patches.
    """
    inputs = {"pixel_values": pixels} if hasattr(model, "config") else {"x": pixels}
    height, width = pixels.shape[-2:]
    calls: Counter[int] = Counter()
    other: list[tuple[int, ...]] = []

    def see(site: Site) -> None:
        b, _, n, m = site.shape
        if b == 1 and n == m and not site.cross:
            calls[n] += 1
        else:
            other.append((b, n, m))

    with torch.no_grad(), capture(model, see):
        model(**inputs) if hasattr(model, "config") else model(pixels)
    # Maps that a model pads lie on no even cut of the image; they are left out, as windows are.
    even = (s for s in range(1, min(height, width) // 2 + 1) if height % s == width % s == 0)
    cuts = [*even] if patch is None else [patch]
    for tokens, _ in sorted(calls.items(), key=lambda item: (-item[1], -item[0])):
        fits = [(tokens - (height // s) * (width // s), s) for s in cuts]
        fits = [fit for fit in fits if 0 <= fit[0] <= min(MOST_BEFORE, tokens // 2)]
        if fits:
            before, side = min(fits)
            break
    else:
        told = ", ".join(f"{n}" for n in calls) or "none"
        windows = f", and in windows or on parts of the patches {len(other)} times" if other else ""
        raise ValueError(
            f"{type(model).__name__} has no self-attention over all patches of its {height} x {width} image "
            f"(tokens attended over: {told}{windows}); heedful inspects image models that do"
        )
    grid = (height // side, width // side)
    labels = ["[CLS]", *(f"[REG{i}]" for i in range(1, before))][:before]
    labels += [f"{y + 1},{x + 1}" for y in range(grid[0]) for x in range(grid[1])]
    special = torch.arange(len(labels)) < before
    averages = getattr(model, "global_pool", "token") not in ("token", "")  # as timm says it
    reads = slice(before, None) if averages or not before else slice(0, 1)
    shown = pixels[0].float()
    if mean is not None and deviation is not None:
        shown = shown * torch.tensor(deviation).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        shown = (shown - shown.amin()) / (shown.amax() - shown.amin()).clamp(min=1e-6)
    return Sample(title, inputs, labels, special, None, grid, _address(shown), reads)


def _address(pixels: Float[Tensor, "3 height width"]) -> str:
    """A picture of colours from 0 to 1 as a data: address."""
    buffer = io.BytesIO()
    colours = (pixels.clamp(0, 1).permute(1, 2, 0) * 255).byte().cpu().numpy()
    Image.fromarray(colours).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
