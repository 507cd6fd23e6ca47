"""Self-supervised pretraining for vision backbones."""

__version__ = "0.1.0"
