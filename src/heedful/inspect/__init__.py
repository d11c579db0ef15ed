"""Looking into patterns and models: what can be reached, what matters, which spans would do."""

from heedful.inspect.attention_influence import attention_influence, block_influence, profile_influence
from heedful.inspect.receptive_field import ReceptiveField, receptive_field
from heedful.inspect.span_search import SpanPlan, search_spans, span_candidates

__all__ = [
    "ReceptiveField",
    "SpanPlan",
    "attention_influence",
    "block_influence",
    "profile_influence",
    "receptive_field",
    "search_spans",
    "span_candidates",
]
