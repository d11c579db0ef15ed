"""Agent-CSwin: LeapLabTHU/Agent-Attention, with the names of microsoft/CSWin-Transformer."""

from heedful.authors.table import Table

CSWIN = (
    (r"stage1_conv_embed\.0\.(.*)", r"downsample.0.conv.\1"),
    (r"stage1_conv_embed\.2\.(.*)", r"downsample.0.norm.\1"),
    (r"merge(\d)\.(.*)", r"downsample.\1.\2"),
    *(
        pair
        for s in range(4)
        for pair in (
            (rf"stage{s + 1}\.(\d+)\.attns\.(\d)\.get_v\.(.*)", rf"stages.{s}.\1.attend.cores.\2.dwc.\3"),
            (rf"stage{s + 1}\.(\d+)\.attns\.(.*)", rf"stages.{s}.\1.attend.cores.\2"),
            (rf"stage{s + 1}\.(.*)", rf"stages.{s}.\1"),
        )
    ),
)

TABLES = {"AgentCSwin": Table(rename=CSWIN)}
