"""RAT and its parts: Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration."""

from heedful.authors.table import Table

NAF = ((r"sca\.1\.(.*)", r"attend.\1"),)
REGION = ((r"project_out\.(.*)", r"proj.\1"),)
WINDOW = ((r"proj_out\.(.*)", r"proj.\1"),)
LAYER = (
    (r"norm_ra\.(.*)", r"region_norm.\1"),
    (r"ra\.project_out\.(.*)", r"region.proj.\1"),
    (r"ra\.(.*)", r"region.\1"),
    (r"lambda_ra", r"region_scale"),
    (r"norm_ra_mlp\.(.*)", r"region_mlp_norm.\1"),
    (r"mlp_ra\.(.*)", r"region_mlp.\1"),
    (r"norm_wa\.(.*)", r"window_norm.\1"),
    (r"wa\.proj_out\.(.*)", r"window.proj.\1"),
    (r"wa\.(.*)", r"window.\1"),
    (r"lambda_wa", r"window_scale"),
    (r"norm_wa_mlp\.(.*)", r"window_mlp_norm.\1"),
    (r"mlp_wa\.(.*)", r"window_mlp.\1"),
)


def behind(prefix: str, *pairs: tuple[str, str], ours: str = r"\1") -> tuple[tuple[str, str], ...]:
    """Renames of a module that stands behind a prefix of one group."""
    return tuple((prefix + theirs, ours + new.replace(r"\1", r"\2")) for theirs, new in pairs)


NET = (
    *behind(r"((?:en|de)coders\.\d+\.\d+\.)", *NAF),
    *behind(r"middle_blks\.(\d+\.layers\.\d+\.)", *LAYER, ours=r"middle.\1"),
    (r"middle_blks\.(.*)", r"middle.\1"),
)

TABLES = {
    "RegionAttention": Table(rename=REGION),
    "WindowAttention": Table(rename=WINDOW),
    "Layer": Table(rename=LAYER),
    "NAFBlock": Table(rename=NAF),
    "RegionAttentionTransformer": Table(rename=NET),
}
