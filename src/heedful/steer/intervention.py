"""The contract of an intervention, and the sequence that a model under intervention has read so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.hf.cache_name import cache_of
from heedful.hf.tap import Handler, Site, tap


class Intervention(Handler):
    """A change of a model's attention: `with intervention(model): ...`.

    A subclass overrides what it changes (`logits`, `weights`, `output`; see `heedful.hf.Handler`), and where
    it needs to: `idle` (at strength 0 the model is not touched at all), `enter` (hooks, which the stack
    removes) and `forget`
    (what it noted of a sequence, dropped when the context ends and when another sequence begins). `reading`
    tells which tokens the model has read.
    """

    reading: Reading
    model: PreTrainedModel

    @property
    def idle(self) -> bool:
        """Whether the settings change nothing."""
        return False

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        """Look at the model and put hooks in place; raises ValueError for a model that does not fit."""

    def forget(self) -> None:
        """Drop what was noted of the sequence."""

    def wants(self, site: Site) -> bool:
        return not site.cross and self.reading.is_decoder(site)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Change the attention of `model` inside this context."""
        if hasattr(self, "model"):
            raise ValueError(f"this {type(self).__name__} is in use already; make another one")
        if self.idle:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(tap(model, self))
            self.model, self.reading = model, Reading(model)
            stack.callback(self._leave)
            stack.enter_context(self.reading.follow(self.forget))
            self.enter(model, stack)
            yield

    def _leave(self) -> None:
        self.forget()
        del self.model, self.reading


class Reading:
    """The token ids that a model has read of the sequences at hand, kept up by hooks on its forward.

    ids      (b, m) since the sequences began; -1 where only embeddings were given
    fresh    how many of them the current call brought
    layers   number of decoder layers
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        text = model.config.get_text_config(decoder=True)
        self.layers = int(text.num_hidden_layers)
        self.ids: Int[Tensor, "b m"] = torch.zeros(0, 0, dtype=torch.long)
        self.fresh = 0
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self._inside = next((name for name, module in model.named_modules() if module is decoder), "")

    def is_decoder(self, site: Site) -> bool:
        """Whether a call is one of the decoder's self-attention, not of a vision tower's or an encoder's."""
        return site.name.startswith(self._inside)

    def of(self, *names: str) -> Bool[Tensor, "b m"]:
        """Where the tokens are whose ids the configuration has under the first of `names` that it knows.

        Raises ValueError if it knows none, or if embeddings were given in place of ids.
        """
        value = token_id(self.model, *names)
        if bool((self.ids == -1).any()):
            raise ValueError(
                "the model was given inputs_embeds, must be given input_ids for tokens to be found"
            )
        return self.ids == value

    def first_key(self, site: Site) -> int:
        """Which of the tokens read the first key of a call is: not the first one in a sliding cache."""
        return self.ids.shape[1] - site.query.shape[2] - site.visibility["query_offset"]

    def on_keys(self, site: Site, told: Shaped[Tensor, "*b k"], value: float = 0) -> Shaped[Tensor, "*b m"]:
        """What is told of the tokens read, for the keys of a call; `value` for those that nothing is told of.

        A sliding cache has only the last tokens, a static one has places for more.
        """
        told = told[..., self.first_key(site) :].to(site.key.device)
        return nn.functional.pad(told, (0, site.key.shape[2] - told.shape[-1]), value=value)

    @contextmanager
    def follow(self, begin: Any) -> Iterator[None]:
        """Keep `ids` up while the context lasts; `begin` is called when new sequences begin."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            if given is None:
                embeds = kwargs.get("inputs_embeds")
                if embeds is None:  # a model of images: each call is a new one
                    begin()
                    return
                given = torch.full(embeds.shape[:2], -1, device=embeds.device)
            past = cache_of(kwargs)
            if past is None or past.get_seq_length() == 0 or self.ids.shape[0] != given.shape[0]:
                self.ids = given
                begin()
            else:
                self.ids = torch.cat([self.ids[:, : past.get_seq_length()], given], dim=1)
            self.fresh = given.shape[1]

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def token_id(model: PreTrainedModel, *names: str) -> int:
    """What the configuration has under the first of `names` that it knows; a ValueError if it knows none."""
    for name in names:
        value = getattr(model.config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(
        f"the configuration of {type(model).__name__} has none of {', '.join(names)}, "
        "so the tokens cannot be found; tell where they are"
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model's decoder; a ValueError if they cannot be found."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name in ("layers", "h", "blocks"):
        found = getattr(decoder, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(f"model is a {type(model).__name__}, whose decoder layers are not under a known name")
