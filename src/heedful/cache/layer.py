"""What every cache policy shares: a cache layer that forgets, inside transformers' own cache classes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from heedful.hf.attention import Visibility, keepers


class PolicyLayer(DynamicLayer):
    """Keys and values of one layer, of which a policy keeps a part.

    Position ids go on growing, because `get_seq_length` counts the tokens seen; `keys` and `values` (b, hkv,
    kept, d) hold what is kept, KV heads unrepeated, keys as the model rotated them. A policy says what
    attention gets to read
    (`read`) and what stays afterwards (`retain`). It learns the queries and the padding of a call from the
    attention implementation "heedful"; a policy that needs neither also works with any other one, for one
    sequence at a time.

    valid   (b, kept) or (b, hkv, kept), False = padding; None while no padding was seen
    """

    keys: Tensor  # type: ignore[assignment]  # None before the first update
    values: Tensor  # type: ignore[assignment]
    is_croppable = False
    needs_queries = False  # whether `retain` looks at the queries of the call
    rows: tuple[str, ...] = ("keys", "values", "valid")  # the tensors with the batch as their first axis

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.valid: Tensor | None = None
        self._pending = False  # whether the policy has not been applied since the last update

    # -- the policy ---------------------------------------------------------------------------------

    def read(self) -> tuple[Float[Tensor, "b hkv m d"], Float[Tensor, "b hkv m e"]]:
        """The keys and values that attention gets; the last ones are the new tokens."""
        return self.keys, self.values

    def readable(self) -> Bool[Tensor, "..."] | None:
        """The mask of what `read` gave: (b, m) or (b, hkv, m)."""
        return self.valid

    def retain(self, query: Float[Tensor, "b hq n d"] | None, scale: float, told: Visibility | None) -> None:
        """Drop what the policy does not keep; called once after each update, before attention is computed."""

    def store(self, key: Float[Tensor, "b hkv n d"], value: Float[Tensor, "b hkv n e"]) -> None:
        """Take in the new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
            self.keys, self.values = key, value
        else:
            self.keys = torch.cat([self.keys, key], dim=-2)
            self.values = torch.cat([self.values, value], dim=-2)

    def held(self) -> int:
        """How many tokens the layer holds; those that `valid` tells of."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def see(self, query: Float[Tensor, "b hq n d"], told: Visibility) -> Visibility:
        """What the queries see of the keys that `read` gave."""
        mask = self.readable()
        if mask is None or mask.ndim == 2:
            return {**told, "key_mask": mask}
        groups = query.shape[1] // mask.shape[1]
        bias = query.new_zeros(()).masked_fill(~mask.repeat_interleave(groups, dim=1)[:, :, None], -torch.inf)
        return {**told, "key_mask": None, "bias": bias if told["bias"] is None else told["bias"] + bias}

    # -- transformers' interface --------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.settle()
        self.store(key_states, value_states)
        self.seen += key_states.shape[-2]
        keys, values = self.read()
        if keys is key_states:  # a tensor of our own, to be asked about
            keys = keys.view_as(keys)
        self._pending = True
        keepers[keys] = self._asked
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.settle()
        kept = self.held()
        return kept + query_length, self.seen - kept

    def reset(self) -> None:
        super().reset()
        self.seen, self.valid, self._pending = 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(f"a {type(self).__name__} forgets tokens and cannot be cropped; use a DynamicCache")

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices])

    def nbytes(self) -> int:
        """Bytes held."""
        self.settle()
        tensors = [x for name in self.rows if isinstance(x := getattr(self, name), Tensor)]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    # -- inside -------------------------------------------------------------------------------------

    def keep(self, index: Int[Tensor, "b k"] | Int[Tensor, "b hkv k"]) -> None:
        """Keep the entries with these indices, in this order, and free the others."""
        if index.ndim == 2:
            index = index[:, None].expand(-1, self.keys.shape[1], -1)
        for name in ("keys", "values"):
            x = getattr(self, name)
            setattr(self, name, x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])))
        if self.valid is not None:
            valid = self.valid if self.valid.ndim == 3 else self.valid[:, None].expand(-1, index.shape[1], -1)
            self.valid = valid.gather(2, index)

    def _asked(self, query: Tensor, key: Tensor, value: Tensor, scale: float, told: Visibility) -> Visibility:
        """Attention over the keys that `read` gave is about to be computed: see `heedful.hf.keepers`."""
        new, mask = query.shape[2], told["key_mask"]
        if mask is not None or self.valid is not None:
            kept = self.held() - new
            fresh = (
                self.keys.new_ones(query.shape[0], new, dtype=torch.bool) if mask is None else mask[:, -new:]
            )
            old = (
                self.keys.new_ones(query.shape[0], kept, dtype=torch.bool)
                if self.valid is None
                else self.valid
            )
            if old.ndim == 3:
                fresh = fresh[:, None].expand(-1, old.shape[1], -1)
            self.valid = torch.cat([old, fresh], dim=-1)
        told = self.see(query, told)
        self.retain(query, scale, told)
        self._pending = False
        return told

    def settle(self) -> None:
        """Apply the policy where no attention implementation has asked since the last update."""
        if not self._pending:
            return
        if self.needs_queries or self.keys.shape[0] > 1:
            why = "looks at the queries" if self.needs_queries else "must know the padding of a batch"
            raise ValueError(
                f"{type(self).__name__} {why}, which the model's attention implementation did not tell; "
                'call model.set_attn_implementation("heedful") after import heedful.hf'
            )
        self.retain(None, 1.0, None)
        self._pending = False

    def _rows(self, change: Any) -> None:
        self.settle()
        for name in self.rows:
            if isinstance(x := getattr(self, name), Tensor):
                setattr(self, name, change(x))


class PolicyCache(Cache):
    """A cache whose full-attention layers follow a policy; sliding and linear layers stay transformers' own.

    model  a transformers model, or its configuration
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, make: Any) -> None:
        config = config_of(model)
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[make(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(layers)]
        )

    def nbytes(self) -> int:
        """Bytes held by the keys, values and notes of all layers."""
        return sum(_nbytes(layer) for layer in self.layers)


def config_of(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the decoder; a ValueError if `model` is neither a model nor a configuration."""
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model is a {type(model).__name__}, must be a transformers model or configuration")
    return config.get_text_config(decoder=True)


def full_layers(model: PreTrainedModel | PreTrainedConfig) -> list[int]:
    """The layers of full attention, which a policy rules."""
    layers = DynamicCache(config=config_of(model)).layers
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _nbytes(layer: Any) -> int:
    if isinstance(layer, PolicyLayer):
        return layer.nbytes()
    tensors = [x for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def per_layer(model: PreTrainedModel | PreTrainedConfig, name: str, value: Any) -> list[Any]:
    """An argument for each layer: `value` for all, or a list of one for each.

    Raises ValueError, naming the argument, if the list is not as long as the model has layers.
    """
    layers = config_of(model).num_hidden_layers
    if not isinstance(value, list | tuple):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(f"{name} has {len(value)} entries, must have one for each of {layers} layers")
    return list(value)
