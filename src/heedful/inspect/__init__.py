"""Looking into patterns and models: what can be reached, what matters, which spans would do."""

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
    "ReceptiveField",
    "ResidualPaths",
    "SpanPlan",
    "ablate_paths",
    "attention_influence",
    "block_influence",
    "path_components",
    "path_distillation",
    "profile_influence",
    "receptive_field",
    "relative_log_amplitude",
    "reweighted",
    "search_spans",
    "span_candidates",
]
