"""Flowformer: thuml/Flowformer, Flow_Attention.py, both the normal and the causal module."""

from heedful.authors.table import Table

TABLES = {"FlowAttention": Table(rename=((r"(query|key|value|out)_projection\.(.*)", r"\1.\2"),))}
