"""SPES: saliency from masks and probabilities, and its normalisation."""

from __future__ import annotations

from typing import Any

from heedful.inspect import PerturbationSaliency, SpeechSaliency, token_divergence
from tests.parity.harness import Tensors, adapter


@adapter("spes")
def spes(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    scores = token_divergence(inputs["orig_probs"], inputs["perturbed_probs"])
    features, tokens = PerturbationSaliency(), PerturbationSaliency()
    features.add(scores, inputs["fbank_masks"])
    tokens.add(scores, inputs["token_masks"])
    plain = SpeechSaliency(features.saliency, tokens.saliency.tril())
    standard = plain.standardised()
    steps = {"saliency": plain, "std": standard, "minmax": standard.joint_min_max()}
    return {f"fbank_{name}": maps.features for name, maps in steps.items()} | {
        f"token_{name}": maps.tokens[..., None] for name, maps in steps.items()
    }
