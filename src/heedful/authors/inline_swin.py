"""InLine-Swin: LeapLabTHU/InLine, with the names of microsoft/Swin-Transformer."""

from heedful.authors.table import Table

MIXER = r"stages\.\d\.\d+\.mixer\."
UNLEARNED = (r".*\.relative_position_index", r".*\.attn_mask")  # follow from the size of the window

SWIN = (
    (r"patch_embed\.(.*)", r"downsample.0.\1"),
    (r"layers\.(\d)\.blocks\.(\d+)\.attn\.relative_position_bias_table", r"stages.\1.\2.mixer.relative_bias"),
    (r"layers\.(\d)\.blocks\.(\d+)\.attn\.(.*)", r"stages.\1.\2.mixer.\3"),
    (r"layers\.(\d)\.blocks\.(.*)", r"stages.\1.\2"),
    *((rf"layers\.{stage}\.downsample\.(.*)", rf"downsample.{stage + 1}.\1") for stage in range(3)),
)

TABLES = {"InLineSwin": Table(drop=UNLEARNED, rename=SWIN)}
