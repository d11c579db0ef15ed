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
from heedful.inspect.attention_average import attention_average, norm_based_attention
from heedful.inspect.attention_gradient import attention_times_gradient
from heedful.inspect.attention_influence import attention_influence, block_influence, profile_influence
from heedful.inspect.attention_magnets import (
    AttentionMagnets,
    content_words,
    find_global_sinks,
    heatmap_peak,
    with_magnets,
)
from heedful.inspect.attention_points import (
    PointPrompts,
    RegularizedAttentionFlow,
    attention_to_points,
    regularized_attention_flow,
)
from heedful.inspect.attention_saliency import attention_saliency, candidate_saliency
from heedful.inspect.attribution import Attribution
from heedful.inspect.capture import capture
from heedful.inspect.context_aware_saliency import context_aware_saliency, salient_relevance_map
from heedful.inspect.correspondence_classifier import (
    CorrespondenceClassifier,
    CorrespondenceVerdict,
    cell_similarity,
    cells_of_points,
    cross_correlation_map,
    nearest_cells,
)
from heedful.inspect.correspondence_page import write_correspondence_page
from heedful.inspect.cross_attention_agreement import (
    CrossAgreement,
    cross_attention_agreement,
    saliency_by_frame,
)
from heedful.inspect.deletion import Curve, deletion_auc, deletion_curve, insertion_curve
from heedful.inspect.distance import (
    attention_distance,
    attention_strength_by_hop,
    grid_distances,
    token_distances,
)
from heedful.inspect.entropy import attention_entropy
from heedful.inspect.explanation_agreement import Agreement, explanation_agreement
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
from heedful.inspect.importance_factor import importance_factor
from heedful.inspect.integrated_gradients import completeness_gap, integrated_gradients
from heedful.inspect.kendall_top_k import kendall_top_k
from heedful.inspect.lime import lime
from heedful.inspect.lrp_cnn import lrp_cnn
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
from heedful.inspect.perturbation_saliency import (
    PerturbationSaliency,
    SpeechSaliency,
    perturbation_saliency,
    segment_masks,
    spectrogram_segments,
    token_divergence,
)
from heedful.inspect.rank_correlation import kendall_tau, pearson, spearman, weighted_kendall_tau
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
from heedful.inspect.saliency_words import Snippet, SnippetSearch, saliency_prompt, saliency_words
from heedful.inspect.similarity_points import (
    LabelledPoints,
    discrete_to_continuous,
    seg_token_similarity_map,
    similarity_to_points,
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
from heedful.inspect.slic import slic
from heedful.inspect.span_search import SpanPlan, search_spans, span_candidates
from heedful.inspect.speech_predictor import cross_attention, speech_predictor
from heedful.inspect.target import Target, image_target, text_target
from heedful.inspect.vision_head_divergence import token_vhd, vision_head_divergence
from heedful.inspect.visual_contrast import color_complexity, contrast_attention, visual_attention_entropy

# What the report is made of is loaded when asked for.
_LAZY = {
    "Findings": "findings",
    "HeadProfile": "head_profile",
    "Sample": "sample",
    "Subject": "sample",
    "image_sample": "pictures",
    "inspect_model": "findings",
    "load_subject": "subjects",
    "report": "html_report",
    "text_samples": "subjects",
    "write_html": "html_report",
}

__all__ = [
    "Agreement",
    "AssociativeCapacity",
    "AttentionMagnets",
    "AttentionRollout",
    "Attribution",
    "CorrespondenceClassifier",
    "CorrespondenceVerdict",
    "CrossAgreement",
    "Curve",
    "Findings",
    "HeadImportance",
    "HeadProfile",
    "LabelledPoints",
    "PatternEmbedding",
    "PerturbationSaliency",
    "PointPrompts",
    "ReceptiveField",
    "RegularizedAttentionFlow",
    "ResidualPaths",
    "RhythmProfile",
    "Sample",
    "Site",
    "Snippet",
    "SnippetSearch",
    "SpanPlan",
    "SpeechSaliency",
    "Subject",
    "Target",
    "Visibility",
    "ablate_paths",
    "accuracy_drop",
    "associative_capacity",
    "attention_average",
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
    "cell_similarity",
    "cells_of_points",
    "color_complexity",
    "completeness_gap",
    "content_words",
    "context_aware_saliency",
    "contrast_attention",
    "cosine_distance",
    "cross_attention",
    "cross_attention_agreement",
    "cross_correlation_map",
    "deletion_auc",
    "deletion_curve",
    "discrete_to_continuous",
    "effective_rank",
    "embed_patterns",
    "explanation_agreement",
    "fai",
    "find_global_sinks",
    "find_sink_dims",
    "find_sink_tokens",
    "find_sinks",
    "future_sums",
    "gradient",
    "gradient_times_input",
    "grid_distances",
    "head_importance_by_pruning",
    "heatmap_peak",
    "high_responses",
    "image_sample",
    "image_target",
    "importance_factor",
    "insertion_curve",
    "inspect_model",
    "integrated_gradients",
    "jensen_shannon",
    "kendall_tau",
    "kendall_top_k",
    "lime",
    "load_subject",
    "lrp_cnn",
    "massive_activations",
    "mean_cosine",
    "nearest_cells",
    "norm_based_attention",
    "occlusion",
    "path_components",
    "path_distillation",
    "pearson",
    "perturbation_saliency",
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
    "saliency_by_frame",
    "saliency_prompt",
    "saliency_words",
    "salient_relevance_map",
    "search_spans",
    "seg_token_similarity_map",
    "segment_masks",
    "signal_to_interference",
    "silenced",
    "similarity_to_points",
    "sink_score",
    "slic",
    "span_candidates",
    "spearman",
    "spectrogram_segments",
    "speech_predictor",
    "split_local_global_heads",
    "text_samples",
    "text_target",
    "token_distances",
    "token_divergence",
    "token_vhd",
    "vision_head_divergence",
    "visual_attention_entropy",
    "waad",
    "weighted_kendall_tau",
    "with_magnets",
    "with_residual",
    "write_correspondence_page",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"heedful.inspect.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
