"""Agent attention: LeapLabTHU/Agent-Attention. The names and layouts are the authors'."""

from heedful.authors.table import Table

TABLES = {"AgentAttention": Table()}
