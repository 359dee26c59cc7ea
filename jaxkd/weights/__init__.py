"""Files of weights in and out: PyTorch, safetensors, exported programs and hub folders."""

from jaxkd.weights.onnx_files import save_onnx
from jaxkd.weights.programs import save_program
from jaxkd.weights.safetensors_files import (
    load_safetensors,
    read_class_names,
    read_safetensors,
    save_safetensors,
)
from jaxkd.weights.student_card import StudentCard
from jaxkd.weights.students import Student, load_network, load_student, read_card, save_student
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
    "Student",
    "StudentCard",
    "from_torch",
    "load_network",
    "load_safetensors",
    "load_student",
    "load_variables",
    "load_weights",
    "read_card",
    "read_class_names",
    "read_safetensors",
    "read_torch",
    "save_onnx",
    "save_program",
    "save_safetensors",
    "save_student",
    "save_torch",
    "to_torch",
]
