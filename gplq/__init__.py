"""4-bit Vision Transformers: GPLQ's two stages for timm models, and the checkpoints that they end in.

>>> import gplq
>>> model = gplq.load("model.pt")                                  # doctest: +SKIP
>>> logits = model(images)                                         # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gplq.checkpoint import Checkpoint, load, load_checkpoint
    from gplq.errors import GplqError
    from gplq.models import FloatModel, load_model
    from gplq.pipeline import quantize, train_activations
    from gplq.recipe import Recipe

__version__ = "0.1.0"

# Public name -> module. Imported on first use: torch and timm take seconds, 'gplq --help' should not.
_PUBLIC = {
    "Checkpoint": "gplq.checkpoint",
    "FloatModel": "gplq.models",
    "GplqError": "gplq.errors",
    "Recipe": "gplq.recipe",
    "load": "gplq.checkpoint",
    "load_checkpoint": "gplq.checkpoint",
    "load_model": "gplq.models",
    "quantize": "gplq.pipeline",
    "train_activations": "gplq.pipeline",
}
__all__ = [
    "Checkpoint",
    "FloatModel",
    "GplqError",
    "Recipe",
    "__version__",
    "load",
    "load_checkpoint",
    "load_model",
    "quantize",
    "train_activations",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gplq' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
