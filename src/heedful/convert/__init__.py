"""Checkpoint surgery: weights of one kind of attention made into those of another."""
