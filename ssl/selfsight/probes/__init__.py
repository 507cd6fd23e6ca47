"""Judging a frozen backbone: features of a fixed bank, weighted k-NN, a grid of linear heads."""


class ProbeError(ValueError):
    """A probe cannot be run as asked; one sentence names the key or file and what would work."""
