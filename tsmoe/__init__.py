"""Sparse Mixture-of-Experts time-series foundation models, pretrained with expert parallelism."""

__version__ = "0.1.0"
