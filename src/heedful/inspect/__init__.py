"""Looking into patterns and models: what heads do, what can be reached, which spans would do."""

from heedful.inspect.associative_capacity import (
    AssociativeCapacity,
    associative_capacity,
    effective_rank,
    mean_cosine,
    propagated_error,
    signal_to_interference,
)
from heedful.inspect.attention_influence import attention_influence, block_influence, profile_influence
from heedful.inspect.capture import capture
from heedful.inspect.distance import (
    attention_distance,
    attention_strength_by_hop,
    grid_distances,
    token_distances,
)
from heedful.inspect.entropy import attention_entropy
from heedful.inspect.head_importance import (
    HeadImportance,
    accuracy_drop,
    cosine_distance,
    head_importance_by_pruning,
    jensen_shannon,
    probability_drop,
    silenced,
)
from heedful.inspect.path_ensemble import (
    ResidualPaths,
    ablate_paths,
    path_components,
    path_distillation,
    relative_log_amplitude,
    reweighted,
)
from heedful.inspect.receptive_field import ReceptiveField, receptive_field
from heedful.inspect.rhythm import (
    RhythmProfile,
    fai,
    future_sums,
    rhythm_credit,
    split_local_global_heads,
    waad,
)
from heedful.inspect.rollout import AttentionRollout, attention_flow, with_residual
from heedful.inspect.sinks import (
    find_sink_dims,
    find_sink_tokens,
    find_sinks,
    massive_activations,
    received_attention,
    sink_score,
)
from heedful.inspect.site import Site, Visibility
from heedful.inspect.span_search import SpanPlan, search_spans, span_candidates

__all__ = [
    "AssociativeCapacity",
    "AttentionRollout",
    "HeadImportance",
    "ReceptiveField",
    "ResidualPaths",
    "RhythmProfile",
    "Site",
    "SpanPlan",
    "Visibility",
    "ablate_paths",
    "accuracy_drop",
    "associative_capacity",
    "attention_distance",
    "attention_entropy",
    "attention_flow",
    "attention_influence",
    "attention_strength_by_hop",
    "block_influence",
    "capture",
    "cosine_distance",
    "effective_rank",
    "fai",
    "find_sink_dims",
    "find_sink_tokens",
    "find_sinks",
    "future_sums",
    "grid_distances",
    "head_importance_by_pruning",
    "jensen_shannon",
    "massive_activations",
    "mean_cosine",
    "path_components",
    "path_distillation",
    "probability_drop",
    "profile_influence",
    "propagated_error",
    "received_attention",
    "receptive_field",
    "relative_log_amplitude",
    "reweighted",
    "rhythm_credit",
    "search_spans",
    "signal_to_interference",
    "silenced",
    "sink_score",
    "span_candidates",
    "split_local_global_heads",
    "token_distances",
    "waad",
    "with_residual",
]
