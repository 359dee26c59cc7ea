"""Weights that need a step before they are those of a network.

They are adapters, quantised numbers, or parts that PyTorch multiplies.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkd._messages import list_some
from jaxkd.transfer import Report

# Parts of the names that PEFT and LyCORIS give to adapters and to what lies below them.
_ADAPTER_PARTS = {
    *("base_layer", "modules_to_save", "lora_a", "lora_b", "lora_up", "lora_down"),
    *("lora_embedding_a", "lora_embedding_b", "lora_magnitude_vector", "ia3_l"),
    *("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"),
}
# Last parts of the names of packed numbers and their scales: GPTQ, AWQ, bitsandbytes, fp8 files.
_QUANTIZED_PARTS = {
    *("qweight", "qzeros", "SCB", "absmax", "quant_map", "weight_scale", "weight_scale_inv"),
    *("weight_packed", "_packed_params"),
}
# Of the names of classes and dtypes in a PyTorch file.
_QUANTIZED_TYPES = ("qtensor", "qint", "quint", "float8", "float4", "quantize")

# Last parts of the names of PyTorch's pruning, weight and spectral normalisation.
_PARAMETRIZED_ENDS = ("weight_orig", "bias_orig", "weight_g")
_PARAMETRIZED_PARTS = {"parametrizations"}

MERGE_ADVICE = "merge the adapters first (merge_and_unload in PEFT) and save the whole model"
DEQUANTIZE_ADVICE = "dequantise the weights first, and save them as float32"
REMOVE_ADVICE = (
    "remove them first (torch.nn.utils.prune.remove, remove_weight_norm, or "
    "parametrize.remove_parametrizations) and save again"
)


def check_finished(weights: Mapping[str, Any], target: Mapping[str, Any], report: Report) -> None:
    """Raises `ValueError` if weights are adapters that are not merged, quantised, or in parts.

    What fits into the network of the rest would be another function than that of the file. Names
    that the network has itself, or that a rule leaves out, do not count.

    Args:
        weights: Arrays by name.
        target: The leaves of the network by path.
        report: The match of the two.
    """
    adapters = [name for name in report.unexpected if {*_parts(name.lower())} & _ADAPTER_PARTS]
    if adapters:
        raise ValueError(f"the file holds LoRA adapters, {_count(adapters)}: {MERGE_ADVICE}")
    scaled = [
        source_path
        for source_path, path in report.transferred
        if is_small_float(_dtype(weights[source_path])) and not is_small_float(_dtype(target[path]))
    ]
    if scaled:
        raise ValueError(
            f"the weights are {_dtype(weights[scaled[0]]).name}, {_count(scaled)}, whose scales "
            f"are not part of them: {DEQUANTIZE_ADVICE}"
        )
    integers = [
        mismatch.source_path
        for mismatch in report.mismatched
        if _is_integer(mismatch.source.dtype) and not _is_integer(mismatch.target.dtype)
    ]
    if integers:
        raise ValueError(
            f"the weights are {_dtype(weights[integers[0]]).name} where the network has "
            f"floating-point numbers, {_count(integers)}: {DEQUANTIZE_ADVICE}"
        )
    parts = [
        name
        for name in report.unexpected
        if name.endswith(_PARAMETRIZED_ENDS) or {*_parts(name)} & _PARAMETRIZED_PARTS
    ]
    if parts and report.missing:
        raise ValueError(
            f"weights are in parts, as pruning and weight normalisation leave them, "
            f"{_count(parts)}: {REMOVE_ADVICE}"
        )
    packed = [name for name in report.unexpected if _parts(name)[-1] in _QUANTIZED_PARTS]
    if packed and report.missing:
        raise ValueError(f"the weights are quantised, {_count(packed)}: {DEQUANTIZE_ADVICE}")


def is_small_float(dtype: Any) -> bool:
    """True for floating-point numbers of at most 8 bits, which files keep with separate scales."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 1


def is_quantized_type(name: str) -> bool:
    """True for the name of a class or dtype of PyTorch that holds quantised numbers."""
    return any(part in name.lower() for part in _QUANTIZED_TYPES)


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def _dtype(array: Any) -> np.dtype:
    return np.dtype(array.dtype if hasattr(array, "dtype") else type(array))


def _parts(name: str) -> list[str]:
    return name.replace("/", ".").split(".")


def _count(names: Iterable[str]) -> str:
    names = [*names]
    return f"{len(names)} array{'s' * (len(names) != 1)} such as {list_some(names[:1], limit=60)}"
