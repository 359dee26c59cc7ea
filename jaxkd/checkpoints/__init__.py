"""Files of weights: the checkpoints of a training, and what PyTorch leaves."""

from jaxkd.checkpoints.store import Restored, load, restore, save, write_atomically
from jaxkd.checkpoints.weights import from_torch, load_weights, read_safetensors, save_torch, to_torch

__all__ = [
    "Restored",
    "from_torch",
    "load",
    "load_weights",
    "read_safetensors",
    "restore",
    "save",
    "save_torch",
    "to_torch",
    "write_atomically",
]
