"""Files of weights in and out: PyTorch, safetensors, exported programs and hub folders."""

from jaxkd.weights.programs import save_program
from jaxkd.weights.safetensors_files import (
    load_safetensors,
    read_class_names,
    read_safetensors,
    save_safetensors,
)
from jaxkd.weights.torch_files import (
    from_torch,
    load_variables,
    load_weights,
    save_torch,
    to_torch,
)
from jaxkd.weights.torch_pickle import OpaqueObject, read_torch

# `hub` is left out, because it imports Flax: use `from jaxkd.weights import hub`.
__all__ = [
    "OpaqueObject",
    "from_torch",
    "load_safetensors",
    "load_variables",
    "load_weights",
    "read_class_names",
    "read_safetensors",
    "read_torch",
    "save_program",
    "save_safetensors",
    "save_torch",
    "to_torch",
]
