"""SpectFormer: badripatro/SpectFormers. The names of the filter are the authors'."""

from heedful.authors.table import Table

TABLES = {"SpectralGating": Table()}
