"""Checkpoint surgery: weights of one kind of attention made into those of another."""

from heedful.torchvision_shim import mend_torchvision

mend_torchvision()
