"""Hierarchical Budget Policy Optimization (arXiv 2507.15844) in JAX."""

__version__ = "0.1.0"
