"""jsfdd: cheap training of speculative-decoding draft models in JAX."""

__version__ = "0.1.0"
