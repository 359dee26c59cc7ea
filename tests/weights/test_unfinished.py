"""Adapters that are not merged and quantised weights are refused, whatever `strict` is."""

import ml_dtypes
import numpy as np
import pytest

from jaxkd import layout
from jaxkd.transfer import Rule, TransferError
from jaxkd.weights import from_torch, load_weights, read_safetensors

RULES = (Rule("fc.weight", "params/fc/kernel", layout.DENSE), Rule("fc.bias", "params/fc/bias"))


def variables(dtype=np.float32):
    return {"params": {"fc": {"kernel": np.zeros((4, 8), dtype), "bias": np.zeros(8, dtype)}}}


def weights(**changes):
    return {"fc.weight": np.ones((8, 4), np.float32), "fc.bias": np.ones(8, np.float32)} | changes


CASES = {
    "PEFT": (
        {
            "base_model.model.fc.base_layer.weight": np.ones((8, 4), np.float32),
            "base_model.model.fc.lora_A.default.weight": np.ones((2, 4), np.float32),
            "base_model.model.fc.lora_B.default.weight": np.ones((8, 2), np.float32),
            "base_model.model.fc.bias": np.ones(8, np.float32),
        },
        "holds LoRA adapters, 3 arrays such as .*fc.base_layer.weight: merge the adapters first",
    ),
    "beside the weights": (
        weights(**{"lora_unet_fc.lora_up.weight": np.ones((8, 2), np.float32)}),
        r"holds LoRA adapters, 1 array such as lora_unet_fc.lora_up.weight: .*merge_and_unload",
    ),
    "int8": (
        weights(**{"fc.weight": np.ones((8, 4), np.int8)}),
        "are int8 where .* floating-point numbers, 1 array such as fc.weight: dequantise",
    ),
    "4 bits": (
        weights(**{"fc.weight": np.ones((16, 1), np.uint8), "fc.weight.absmax": np.ones(1)}),
        "are uint8 where .* dequantise",
    ),
    "float8": (
        weights(**{"fc.weight": np.ones((8, 4), ml_dtypes.float8_e4m3fn)}),
        "are float8_e4m3fn, 1 array such as fc.weight, whose scales are not .*: dequantise",
    ),
    "float8 of AMD": (
        weights(**{"fc.weight": np.ones((8, 4), ml_dtypes.float8_e5m2fnuz)}),
        "are float8_e5m2fnuz, .*dequantise",
    ),
    "GPTQ": (
        {"fc.qweight": np.ones((1, 8), np.int32), "fc.bias": np.ones(8, np.float32)},
        "are quantised, 1 array such as fc.qweight: dequantise the weights first",
    ),
    "pruning": (
        {
            "fc.weight_orig": np.ones((8, 4), np.float32),
            "fc.weight_mask": np.ones((8, 4), np.float32),
            "fc.bias": np.ones(8, np.float32),
        },
        "are in parts, .*, 1 array such as fc.weight_orig: remove them first .*prune.remove",
    ),
    "weight normalisation": (
        {
            "fc.weight_g": np.ones((8, 1), np.float32),
            "fc.weight_v": np.ones((8, 4), np.float32),
            "fc.bias": np.ones(8, np.float32),
        },
        "are in parts, .*fc.weight_g: remove them first .*remove_weight_norm",
    ),
    "parametrizations": (
        {
            "fc.parametrizations.weight.original0": np.ones((8, 1), np.float32),
            "fc.parametrizations.weight.original1": np.ones((8, 4), np.float32),
            "fc.bias": np.ones(8, np.float32),
        },
        "are in parts, .*, 2 arrays such as fc.parametrizations.*remove_parametrizations",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strict", [True, False])
def test_unfinished_weights_are_refused_in_one_line(case, strict):
    state_dict, message = CASES[case]
    with pytest.raises(ValueError, match=message) as caught:
        from_torch(state_dict, variables(), RULES, strict=strict)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_adapters_under_the_names_of_variables_are_refused():
    state_dict = {
        "params/fc/kernel": np.ones((4, 8), np.float32),
        "params/fc/bias": np.ones(8, np.float32),
        "params/fc/lora_a": np.ones((4, 2), np.float32),
    }
    with pytest.raises(ValueError, match="1 array such as params/fc/lora_a: merge"):
        from_torch(state_dict, variables(), (), strict=False)


def test_what_a_network_has_itself_or_a_rule_leaves_out_is_no_adapter():
    adapters = {"fc.lora_A": np.ones((2, 4), np.float32)}
    _, report = from_torch(
        weights(**adapters), variables(), (*RULES, Rule("{rest...}.lora_A", None))
    )
    assert report.left_out == ("fc.lora_A",)
    own = {"params": variables()["params"] | {"lora": np.zeros((2, 4), np.float32)}}
    _, report = from_torch(weights(**adapters), own, (*RULES, Rule("fc.lora_A", "params/lora")))
    assert report.complete


def test_a_network_in_float8_takes_its_own_weights():
    dtype = ml_dtypes.float8_e4m3fn
    small = {name: array.astype(dtype) for name, array in weights().items()}
    assert from_torch(small, variables(dtype), RULES)[1].complete


def test_single_integers_and_other_names_are_a_mismatch_as_before():
    state_dict = weights(scale=np.ones(3, np.float32))
    with pytest.raises(TransferError, match="1 unexpected"):
        from_torch(state_dict, variables(), RULES)


def test_float8_in_a_file_is_named(tmp_path):
    from safetensors.numpy import save

    path = tmp_path / "file"
    path.write_bytes(save({"fc.weight": np.ones((8, 4), ml_dtypes.float8_e4m3fn)}))
    for read in (load_weights, read_safetensors):
        with pytest.raises(ValueError, match="float8_e4m3fn.*: dequantise the weights first"):
            read(path)
