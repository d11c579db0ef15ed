"""A backbone as an ONNX file, checked against what torch computes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from heedful.models.backbone import Backbone

TOLERANCE = 1e-3  # float32, many layers, and operators fused differently


def export_onnx(model: Backbone, path: str | Path, *, size: tuple[int, int]) -> float:
    """Write `model` as ONNX for images (batch, in_channels, *size), any batch, and check it with onnxruntime.

    size  height and width of the image, in pixels

    Gives the largest difference, relative to the largest output. Raises ValueError if it is above 1e-3, and
    ImportError where the extra "export" is not installed. The model is left in the mode it was in.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as missing:
        raise ImportError("export needs onnx and onnxruntime: pip install 'heedful[export]'") from missing
    training = model.training
    model.eval()
    x = torch.randn(2, model.in_channels, *size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()))
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (x,),
                str(path),
                input_names=["image"],
                output_names=["output"],
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            wanted = model(x[:1])
    finally:
        logger.setLevel(level)
        model.train(training)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"image": x[:1].cpu().numpy()})
    references = wanted if isinstance(wanted, list) else [wanted]
    error = max(
        float(np.abs(y - r.cpu().numpy()).max() / np.abs(r.cpu().numpy()).max())
        for y, r in zip(outputs, references, strict=True)
    )
    if not error <= TOLERANCE:
        raise ValueError(
            f"the exported model differs from torch's by {error:.1e}, must differ by less than {TOLERANCE}"
        )
    return error
