"""Efficient channel attention: BangguWu/ECANet. The names are the authors'."""

from heedful.authors.table import Table

TABLES = {"ECA": Table()}
