"""Judging a backbone: k-NN, linear and attentive heads on a bank of frozen features, fine-tuning."""


class ProbeError(ValueError):
    """A probe cannot be run as asked; one sentence names the key or file and what would work."""
