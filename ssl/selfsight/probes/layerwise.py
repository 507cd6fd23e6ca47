"""The same head on every block or stage: where in the backbone the classes are easiest to read."""

from .attentive import run, wants

__all__ = ["run", "wants"]
