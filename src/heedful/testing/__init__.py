"""Checks for mechanisms of one's own: what a mixer or a backbone declares is proven."""

from heedful.testing.check_backbone import check_backbone
from heedful.testing.check_mixer import BoundCheck, check_mixer, mixer_checks, parametrize_mixers

__all__ = ["BoundCheck", "check_backbone", "check_mixer", "mixer_checks", "parametrize_mixers"]
