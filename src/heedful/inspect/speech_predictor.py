"""Forced decoding by an encoder-decoder of speech, as the measures of its explanations ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.inspect.capture import capture
from heedful.inspect.site import Site


def speech_predictor(
    model: Any, ids: Int[Tensor, " i"], *, from_encoder: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """(inputs, kept tokens) -> probabilities of the output where the decoder is fed `ids`.

    model         a transformers model of speech with encoder and decoder, such as Whisper; in eval mode
    ids           what the decoder reads, its start tokens included
    from_encoder  the inputs are the encoder's outputs (k, t', c), not features (k, frames, channels)
    """
    embeddings = model.get_decoder().get_input_embeddings()(ids)

    def predict(x: Tensor, kept: Tensor) -> Tensor:
        words = embeddings.expand(len(x), -1, -1)
        if kept.shape[1]:
            words = words * kept[..., None].to(words.dtype)
        given = {"encoder_outputs": (x,)} if from_encoder else {"input_features": x.mT}
        return model(**given, decoder_inputs_embeds=words, use_cache=False).logits.softmax(-1)

    return predict


@torch.no_grad()
def cross_attention(
    model: Any, features: Float[Tensor, "t f"], ids: Int[Tensor, " i"]
) -> Float[Tensor, "layers h i m"]:
    """The decoder's cross-attention in forced decoding, of all layers and heads.

    features  (frames, channels) of one input
    ids       what the decoder reads, its start tokens included

    Raises ValueError for a model without cross-attention.
    """
    tables: list[Tensor] = []

    def see(site: Site) -> None:
        if site.cross:
            tables.append(site.weights()[0])

    with capture(model, see):
        model(input_features=features.T[None], decoder_input_ids=ids[None], use_cache=False)
    if not tables:
        raise ValueError(f"{type(model).__name__} shows no cross-attention, must have some")
    return torch.stack(tables)
