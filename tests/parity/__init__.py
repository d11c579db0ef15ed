"""Parity with the authors' code; `python -m tests.parity --golden DIR` runs it."""
