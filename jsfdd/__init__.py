"""jsfdd: cheap training of speculative-decoding draft models in JAX."""

import logging

__version__ = "0.1.0"

# On import transformers warns that without torch it has no models. They are JAX's here, so nothing is missing.
logging.getLogger("transformers").addFilter(lambda record: not record.getMessage().startswith("PyTorch was not found"))
