"""Token-aware pooling: guoyongcs/TAPADL. The names are the authors'."""

from heedful.authors.table import Table

TABLES = {"TokenAwarePooling": Table()}
