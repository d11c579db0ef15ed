"""Checks for mechanisms of one's own: `check_mixer` proves what a mixer declares, `check_backbone` a model."""

from heedful.testing.check_backbone import check_backbone
from heedful.testing.check_mixer import BoundCheck, check_mixer, mixer_checks, parametrize_mixers

__all__ = ["BoundCheck", "check_backbone", "check_mixer", "mixer_checks", "parametrize_mixers"]
