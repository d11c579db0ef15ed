"""Looking into patterns and models: what heads do, what can be reached, which spans would do."""

from __future__ import annotations

import importlib
from typing import Any

from heedful.inspect.associative_capacity import (
    AssociativeCapacity,
    associative_capacity,
    effective_rank,
    mean_cosine,
    propagated_error,
    signal_to_interference,
)
from heedful.inspect.attention_gradient import attention_times_gradient
from heedful.inspect.attention_influence import attention_influence, block_influence, profile_influence
from heedful.inspect.attention_points import (
    PointPrompts,
    RegularizedAttentionFlow,
    attention_to_points,
    regularized_attention_flow,
)
from heedful.inspect.attention_saliency import attention_saliency, candidate_saliency
from heedful.inspect.attribution import Attribution
from heedful.inspect.capture import capture
from heedful.inspect.deletion import Curve, deletion_auc, deletion_curve, insertion_curve
from heedful.inspect.distance import (
    attention_distance,
    attention_strength_by_hop,
    grid_distances,
    token_distances,
)
from heedful.inspect.entropy import attention_entropy
from heedful.inspect.gradient import gradient, gradient_times_input
from heedful.inspect.head_importance import (
    HeadImportance,
    accuracy_drop,
    cosine_distance,
    head_importance_by_pruning,
    jensen_shannon,
    probability_drop,
    silenced,
)
from heedful.inspect.integrated_gradients import completeness_gap, integrated_gradients
from heedful.inspect.lime import lime
from heedful.inspect.occlusion import occlusion
from heedful.inspect.path_ensemble import (
    ResidualPaths,
    ablate_paths,
    path_components,
    path_distillation,
    relative_log_amplitude,
    reweighted,
)
from heedful.inspect.pattern_embedding import PatternEmbedding, embed_patterns
from heedful.inspect.receptive_field import ReceptiveField, receptive_field
from heedful.inspect.rhythm import (
    RhythmProfile,
    fai,
    future_sums,
    rhythm_credit,
    split_local_global_heads,
    waad,
)
from heedful.inspect.rollout import (
    AttentionRollout,
    attention_flow,
    high_responses,
    rollout_responses,
    with_residual,
)
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
from heedful.inspect.target import Target, image_target, text_target
from heedful.inspect.vision_head_divergence import token_vhd, vision_head_divergence
from heedful.inspect.visual_contrast import color_complexity, contrast_attention, visual_attention_entropy

# What the report is made of is loaded when asked for.
_LAZY = {
    "Findings": "findings",
    "HeadProfile": "head_profile",
    "Sample": "sample",
    "Subject": "sample",
    "image_sample": "subjects",
    "inspect_model": "findings",
    "load_subject": "subjects",
    "report": "html_report",
    "text_samples": "subjects",
    "write_html": "html_report",
}

__all__ = [
    "AssociativeCapacity",
    "AttentionRollout",
    "Attribution",
    "Curve",
    "Findings",
    "HeadImportance",
    "HeadProfile",
    "PatternEmbedding",
    "PointPrompts",
    "ReceptiveField",
    "RegularizedAttentionFlow",
    "ResidualPaths",
    "RhythmProfile",
    "Sample",
    "Site",
    "SpanPlan",
    "Subject",
    "Target",
    "Visibility",
    "ablate_paths",
    "accuracy_drop",
    "associative_capacity",
    "attention_distance",
    "attention_entropy",
    "attention_flow",
    "attention_influence",
    "attention_saliency",
    "attention_strength_by_hop",
    "attention_times_gradient",
    "attention_to_points",
    "block_influence",
    "candidate_saliency",
    "capture",
    "color_complexity",
    "completeness_gap",
    "contrast_attention",
    "cosine_distance",
    "deletion_auc",
    "deletion_curve",
    "effective_rank",
    "embed_patterns",
    "fai",
    "find_sink_dims",
    "find_sink_tokens",
    "find_sinks",
    "future_sums",
    "gradient",
    "gradient_times_input",
    "grid_distances",
    "head_importance_by_pruning",
    "high_responses",
    "image_sample",
    "image_target",
    "insertion_curve",
    "inspect_model",
    "integrated_gradients",
    "jensen_shannon",
    "lime",
    "load_subject",
    "massive_activations",
    "mean_cosine",
    "occlusion",
    "path_components",
    "path_distillation",
    "probability_drop",
    "profile_influence",
    "propagated_error",
    "received_attention",
    "receptive_field",
    "regularized_attention_flow",
    "relative_log_amplitude",
    "report",
    "reweighted",
    "rhythm_credit",
    "rollout_responses",
    "search_spans",
    "signal_to_interference",
    "silenced",
    "sink_score",
    "span_candidates",
    "split_local_global_heads",
    "text_samples",
    "text_target",
    "token_distances",
    "token_vhd",
    "vision_head_divergence",
    "visual_attention_entropy",
    "waad",
    "with_residual",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"heedful.inspect.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
