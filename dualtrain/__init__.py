"""dualtrain: one language model, trained both autoregressively and by masked diffusion."""

from dualtrain.common.compat import prepare_imports

__version__ = "0.1.0"

prepare_imports()
