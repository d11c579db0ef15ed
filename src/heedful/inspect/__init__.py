"""Looking into patterns and models: what can be reached, what matters, which spans would do."""

from heedful.inspect.associative_capacity import (
    AssociativeCapacity,
    associative_capacity,
    effective_rank,
    mean_cosine,
    propagated_error,
    signal_to_interference,
)
from heedful.inspect.attention_influence import attention_influence, block_influence, profile_influence
from heedful.inspect.path_ensemble import (
    ResidualPaths,
    ablate_paths,
    path_components,
    path_distillation,
    relative_log_amplitude,
    reweighted,
)
from heedful.inspect.receptive_field import ReceptiveField, receptive_field
from heedful.inspect.span_search import SpanPlan, search_spans, span_candidates

__all__ = [
    "AssociativeCapacity",
    "ReceptiveField",
    "ResidualPaths",
    "SpanPlan",
    "ablate_paths",
    "associative_capacity",
    "attention_influence",
    "block_influence",
    "effective_rank",
    "mean_cosine",
    "path_components",
    "path_distillation",
    "profile_influence",
    "propagated_error",
    "receptive_field",
    "relative_log_amplitude",
    "reweighted",
    "search_spans",
    "signal_to_interference",
    "span_candidates",
]
