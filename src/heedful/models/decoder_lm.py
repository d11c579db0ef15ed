"""A small causal language model around any causal mixers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heedful.checks import check_mask, check_positive
from heedful.models.sampling import continue_ids
from heedful.models.stack import Output, Stack, StackState, check_ids, next_token_loss
from heedful.registry import register


@register(
    "decoder-lm",
    kind="model",
    paper="attention-is-all-you-need",
    tags=("language model",),
    causal="always",
    decode=True,
)
class DecoderLM(Stack):
    """A causal language model: embedding, pre-norm blocks, norm, logits.

        x = E[ids];  for each layer  x = x + mixer(norm(x)),  x = x + mlp(norm(x));  logits = norm(x) E^T

    vocabulary  tokens
    dim         channels
    depth       layers
    mixers      what mixes tokens: the name of a causal sequence mixer, a pair (name, arguments), or a
                function from dim to a mixer, for all layers; or a list of such, repeated until all layers
                have one: 3 * ["gated-deltanet"] + ["self-attention"] is full attention in every fourth layer
    heads       of the mixers that have heads; None: their own default
    rotary      rotary positions in the mixers that can have them; the others know order as they are built
    mlp         "swiglu", "gelu" or "polynorm" (Motif's);  hidden: its inner width, None: 4 dim for "gelu",
                about 8/3 dim for the others
    norm        "rms" or "layer"
    tied        logits with the embedding's own weights; else a head of its own

    forward: ids (b, n), mask (b, n) with True = a token, False = padding; labels (b, n), usually the ids: the
    loss is the mean cross entropy of each token given those before it, -100 and padding left out. With a
    state (from `init_state`) the ids continue the sequences.
    Raises ValueError on wrong shapes and on mixers that see the future or need more than x.
    Source: Attention Is All You Need, arXiv 1706.03762, in the pre-norm form.
    """

    causal = True
    example: ClassVar[dict[str, Any]] = {"vocabulary": 32, "dim": 16, "depth": 2, "heads": 4}

    def init_state(self, batch: int) -> StackState:
        """The state before the first token; ValueError if a mixer does not decode step by step."""
        check_positive("batch", batch)
        for i, mixer in enumerate(self.mixers):
            if not mixer.entry.decode:
                raise ValueError(
                    f"mixers has {mixer.entry.name!r} in layer {i}, which does not decode step by step"
                )
        return StackState(tuple(mixer.init_state(batch) for mixer in self.mixers))

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        state: StackState | None = None,
    ) -> Output:
        hidden, after = self.encode(ids, mask=mask, state=state)
        logits = self.logits(hidden)
        loss = None if labels is None else next_token_loss(logits, labels, mask)
        return Output(logits, loss, after)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b m"]:
        """The ids continued: one pass over the prompt, then one step a token with the mixers' states.

        temperature, top_k, top_p   see `heedful.models.sampling.sample`; 0 takes the likeliest token
        eos    a row that gives this token is finished and filled with it; all finished ends it early
        mask   False = padding, which has to stand on the left. It is never seen, but mixers that count
               places, as those with blocks or sinks do, count it, and may continue a padded row differently

        Call `eval()` first if a mixer drops out. Raises ValueError if a mixer cannot decode step by step, the
        prompt is empty, or a row ends in padding.
        """
        check_ids(ids)
        check_mask("mask", mask, ids.shape[0], ids.shape[1])
        if mask is not None and not mask[:, -1:].all():
            raise ValueError("mask is False at the last token of a row, must have padding on the left only")
        state: StackState | None = self.init_state(len(ids))
        seen = mask

        def step(piece: Tensor) -> Tensor:
            nonlocal state, seen
            hidden, state = self.encode(piece, mask=seen, state=state)
            seen = None
            return self.logits(hidden[:, -1])

        return continue_ids(
            step,
            ids,
            max_new_tokens,
            eos=eos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
