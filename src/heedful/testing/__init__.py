"""Checks for mechanisms of one's own: `check_mixer` proves what a mixer declares."""

from heedful.testing.check_mixer import BoundCheck, check_mixer, mixer_checks, parametrize_mixers

__all__ = ["BoundCheck", "check_mixer", "mixer_checks", "parametrize_mixers"]
