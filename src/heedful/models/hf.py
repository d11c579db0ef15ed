"""DecoderLM and Encoder behind transformers' Auto classes: `generate`, `Trainer` and `pipeline` work on them.

    import heedful.models.hf
    config = heedful.models.hf.DecoderLMConfig(vocab_size=1000, hidden_size=64, mixers="gated-deltanet")
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generate(ids, attention_mask=mask, num_beams=4)

Importing this module registers the classes. `DecoderLMForCausalLM.of(model)` and
`EncoderForMaskedLM.of(model)` put a model that is there behind the interface; `.model` gives it back.
The loss is that of the labels alone: where mixers have losses of their own (`model.model.aux_losses`), a
Trainer that is to add them needs a `compute_loss` that does.
"""

from __future__ import annotations

import json
from os import PathLike
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from heedful.hf.cache_name import CACHE
from heedful.models.decoder_lm import DecoderLM
from heedful.models.encoder import Encoder
from heedful.models.stack import Stack, StackState, cross_entropy, next_token_loss
from heedful.torchvision_shim import mend_torchvision

mend_torchvision()
try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers import initialization as init
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import (
        BaseModelOutput,
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        MaskedLMOutput,
        SequenceClassifierOutput,
    )
except ModuleNotFoundError as missing:
    raise ImportError("heedful.models.hf needs transformers 5: pip install 'heedful[hf]'") from missing

# Names of transformers for the arguments of DecoderLM and Encoder.
NAMES = {
    "vocab_size": "vocabulary",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "mixers": "mixers",
    "num_attention_heads": "heads",
    "rotary": "rotary",
    "mlp": "mlp",
    "intermediate_size": "hidden",
    "norm": "norm",
    "tie_word_embeddings": "tied",
}


class StackConfig(PreTrainedConfig):
    """What `DecoderLM` and `Encoder` are built from, with transformers' names where it has one (`NAMES`)."""

    __no_type_check__ = True  # transformers makes the constructor, which takes more than its signature says
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    mixers: Any = "self-attention"
    num_attention_heads: int | None = 8
    rotary: bool = True
    mlp: str = "swiglu"
    intermediate_size: int | None = None
    norm: str = "rms"
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def arguments(self) -> dict[str, Any]:
        """Those of the heedful model."""
        return {ours: getattr(self, theirs) for theirs, ours in NAMES.items()}


class DecoderLMConfig(StackConfig):
    model_type = "heedful-decoder-lm"


class EncoderConfig(StackConfig):
    model_type = "heedful-encoder"


class StateCache(Cache):
    """The states of all layers where transformers expects a cache; `state` is None at the start."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: StackState | None = None
        self.rows = 0  # of the state, which may hold no tensor to tell

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.state is None else self.state.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no bound

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)
            self.rows = len(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " b"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("crop is asked of a StateCache, which cannot forget its last tokens")

    def reset(self) -> None:
        self.state, self.rows = None, 0

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # where `generate` is to go on behind what the cache has read


class Encoded(NamedTuple):
    """The output for every token, the state after them, and what every layer was given and the output."""

    hidden: Float[Tensor, "b n c"]
    state: StackState | None
    all_hidden: tuple[Float[Tensor, "b n c"], ...] | None


class StackModel(PreTrainedModel):
    """What the forms below share: one heedful model, in `.model`."""

    config: StackConfig
    base_model_prefix = "model"
    made: type[Stack]
    _is_stateful = True  # states cannot be cut back, so no assisted generation
    _no_split_modules = ["Block"]  # noqa: RUF012  (residual sums stay on one device)
    supports_gradient_checkpointing = True

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        with torch.device("cpu"):  # not on "meta", where `from_pretrained` builds: mixers may hold more than
            self.model = self.made(**config.arguments())  # parameters, such as slopes and patterns
        self.post_init()

    @classmethod
    def of(cls, model: Stack, **config: Any) -> Self:
        """This form around a model that is there, whose parameters it shares."""
        theirs = {theirs: model.config[ours] for theirs, ours in NAMES.items()}
        form = cls(cls.config_class(**theirs, **config))  # type: ignore[misc, arg-type]
        form.model = model
        return form.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: heedful modules start as their papers say."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # type: ignore[assignment]
        self.model.vocabulary = self.model.config["vocabulary"] = len(value.weight)  # type: ignore[arg-type]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    def save_pretrained(self, save_directory: str | PathLike[Any], *given: Any, **how: Any) -> None:
        """As in transformers; ValueError if the mixers are not all given by names and plain arguments."""
        try:
            json.dumps(self.config.mixers)
        except TypeError as wrong:
            raise ValueError(
                "mixers holds what JSON cannot, must be names with plain arguments to save"
            ) from wrong
        super().save_pretrained(save_directory, *given, **how)

    def encode(
        self,
        ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b m"] | None,
        state: StackState | None,
        *,
        output_hidden_states: bool | None = None,
    ) -> Encoded:
        """`Stack.encode` with a mask as transformers gives it: of all tokens so far, not zero = a token."""
        mask = None
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, must be (batch, tokens)"
                )
            mask = attention_mask[:, -ids.shape[1] :].bool()
            mask = None if mask.all() else mask
        recompute = self.gradient_checkpointing and self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            for layer in (self.model.layers if output_hidden_states else ())
        ]
        try:
            hidden, after = self.model.encode(
                ids, mask=mask, state=state, call=self._gradient_checkpointing_func if recompute else None
            )
        finally:
            for hook in hooks:
                hook.remove()
        return Encoded(hidden, after, (*inputs, hidden) if output_hidden_states else None)


class DecoderLMModel(StackModel):
    """`DecoderLM` without logits, as AutoModel gives it."""

    config_class = DecoderLMConfig
    made = DecoderLM

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b m"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        given = past_key_values if cache is None else cache
        made, after = self.advance(
            input_ids, attention_mask, given, use_cache, output_hidden_states=output_hidden_states
        )
        held: dict[str, Any] = {CACHE: after}
        out = BaseModelOutputWithPast(last_hidden_state=made.hidden, hidden_states=made.all_hidden, **held)
        return out if _as_dict(self, return_dict) else out.to_tuple()

    def advance(
        self,
        ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b m"] | None,
        cache: Cache | None,
        use_cache: bool | None,
        *,
        output_hidden_states: bool | None = None,
    ) -> tuple[Encoded, StateCache | None]:
        """The output for every token; a cache is moved on, and made if use_cache asks for it.

        None asks for it in eval mode where the configuration does and every mixer decodes step by step.
        """
        if use_cache is None:
            decode = all(mixer.entry.decode for mixer in self.model.mixers)
            use_cache = self.config.use_cache and not self.training and decode
        if cache is None and use_cache:
            cache = StateCache()
        if cache is None:
            return self.encode(ids, attention_mask, None, output_hidden_states=output_hidden_states), None
        if not isinstance(cache, StateCache):
            raise ValueError(f"{CACHE} is a {type(cache).__name__}, must be a StateCache")
        state = self.model.init_state(len(ids)) if cache.state is None else cache.state  # type: ignore[operator]
        made = self.encode(ids, attention_mask, state, output_hidden_states=output_hidden_states)
        cache.state, cache.rows = made.state, len(ids)
        return made, cache


class DecoderLMForCausalLM(DecoderLMModel, GenerationMixin):
    """`DecoderLM` as transformers' causal language model; its cache holds the mixers' own states.

    Raises ValueError, with use_cache, for mixers that do not decode step by step; use_cache=False generates
    by full passes.
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `advance` makes a StateCache

    def forward(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b m"] | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        given = past_key_values if cache is None else cache
        made, after = self.advance(
            input_ids, attention_mask, given, use_cache, output_hidden_states=output_hidden_states
        )
        logits = self.model.logits(made.hidden[:, -logits_to_keep:])
        loss = None if labels is None else next_token_loss(logits, labels)
        held: dict[str, Any] = {CACHE: after}
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=made.all_hidden, **held)
        return out if _as_dict(self, return_dict) else out.to_tuple()


class EncoderModel(StackModel):
    """`Encoder` without logits, as AutoModel gives it.

    token_type_ids, which BERT's tokenizers give, have no effect: there is no embedding of segments.
    """

    config_class = EncoderConfig
    made = Encoder

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b n"] | None = None,
        token_type_ids: Shaped[Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        made = self.encode(input_ids, attention_mask, None, output_hidden_states=output_hidden_states)
        out = BaseModelOutput(last_hidden_state=made.hidden, hidden_states=made.all_hidden)
        return out if _as_dict(self, return_dict) else out.to_tuple()


class EncoderForMaskedLM(EncoderModel):
    """`Encoder` with its logits for masked tokens."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b n"] | None = None,
        token_type_ids: Shaped[Tensor, "b n"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        made = self.encode(input_ids, attention_mask, None, output_hidden_states=output_hidden_states)
        logits = self.model.logits(made.hidden)
        loss = None if labels is None else cross_entropy(logits, labels)
        out = MaskedLMOutput(loss=loss, logits=logits, hidden_states=made.all_hidden)
        return out if _as_dict(self, return_dict) else out.to_tuple()


class EncoderForSequenceClassification(EncoderModel):
    """`Encoder`, the mean over the tokens of a text, and a linear layer to `num_labels` classes.

    The loss is that of `config.problem_type`; where it is None, the mean squared error with one label, the
    cross entropy for labels (b,) that are whole numbers, else the binary cross entropy of every label.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "classifier", None):  # absent from a checkpoint of the encoder alone
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def forward(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Shaped[Tensor, "b n"] | None = None,
        token_type_ids: Shaped[Tensor, "b n"] | None = None,
        labels: Shaped[Tensor, "b *classes"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        made = self.encode(input_ids, attention_mask, None, output_hidden_states=output_hidden_states)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = real.to(made.hidden.dtype)[..., None]
        logits = self.classifier((made.hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        out = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=made.all_hidden)
        return out if _as_dict(self, return_dict) else out.to_tuple()


def _as_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


AutoConfig.register(DecoderLMConfig.model_type, DecoderLMConfig)
AutoConfig.register(EncoderConfig.model_type, EncoderConfig)
AutoModel.register(DecoderLMConfig, DecoderLMModel)
AutoModel.register(EncoderConfig, EncoderModel)
AutoModelForCausalLM.register(DecoderLMConfig, DecoderLMForCausalLM)
AutoModelForMaskedLM.register(EncoderConfig, EncoderForMaskedLM)
AutoModelForSequenceClassification.register(EncoderConfig, EncoderForSequenceClassification)
