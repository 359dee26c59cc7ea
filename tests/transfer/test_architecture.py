"""Tests of narrower, wider and deeper networks: the functions that they compute in both modes."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import CNN, Outputs, from_linen
from jaxkd.models.layers import BatchNorm
from jaxkd.transfer import (
    Channels,
    Rule,
    TransferError,
    deepen,
    largest_norm,
    leading,
    narrow,
    transfer,
    widen,
)


class Net(nn.Module):
    """A network with batch norm, a depth-wise convolution, a residual stream and extra layers."""

    width: int = 4
    stream: int = 3
    extra: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, inputs, train=False):
        def normalize(x, name):
            return BatchNorm(use_running_average=not train, name=name)(x)

        x = nn.relu(normalize(nn.Conv(self.stream, (3, 3), name="stem")(inputs), "bn0"))
        y = nn.relu(normalize(nn.Conv(self.width, (3, 3), name="conv1")(x), "bn1"))
        y = nn.Conv(self.width, (3, 3), feature_group_count=self.width, name="depthwise")(y)
        x = x + nn.Conv(self.stream, (1, 1), name="conv2")(nn.relu(y))
        x = nn.relu(x + nn.Conv(self.stream, (1, 1), use_bias=False, name="mix")(x))
        if "conv" in self.extra:
            x = nn.Conv(self.stream, (3, 5), name="conv3")(x)
            x = nn.relu(normalize(x, "bn3") if "bn" in self.extra else x)
        x = x[:, ::2, ::2].reshape(len(x), -1)
        if "dense" in self.extra:
            x = nn.Dense(x.shape[-1], name="hidden")(x)
        return Outputs(nn.Dense(2, name="logits")(x), {})


WIDTH = Channels(
    produced={
        "params/conv1/kernel": -1,
        "params/conv1/bias": 0,
        "params/bn1/scale": 0,
        "params/bn1/bias": 0,
        "batch_stats/bn1/mean": 0,
        "batch_stats/bn1/var": 0,
        "params/depthwise/kernel": -1,
        "params/depthwise/bias": 0,
    },
    consumed={"params/conv2/kernel": -2},
)
STREAM = Channels(
    produced={
        "params/stem/kernel": 3,
        "params/stem/bias": 0,
        "params/bn0/scale": 0,
        "params/bn0/bias": 0,
        "batch_stats/bn0/mean": 0,
        "batch_stats/bn0/var": 0,
        "params/conv2/kernel": -1,
        "params/conv2/bias": -1,
        "params/mix/kernel": -1,
    },
    consumed={"params/conv1/kernel": -2, "params/mix/kernel": 2, "params/logits/kernel": 0},
)
CNN_CONV = Channels(
    {"params/conv2/kernel": -1, "params/conv2/bias": 0}, {"params/hidden/kernel": 0}
)
CNN_HIDDEN = Channels(
    {"params/hidden/kernel": -1, "params/hidden/bias": 0}, {"params/logits/kernel": -2}
)


def images():
    return jax.random.normal(jax.random.key(5), (3, 14, 14, 2))


def shapes(module):
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), images())


def draw(module, seed=0):
    """Draws all variables, so that none has the value of its initializer."""
    rng = np.random.default_rng(seed)
    variables = shapes(module)

    def draw_param(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype)

    def draw_statistic(leaf):
        return jnp.asarray(rng.uniform(0.2, 2, leaf.shape), leaf.dtype)

    samplers = {"params": draw_param, "batch_stats": draw_statistic}
    return {kind: jax.tree.map(samplers[kind], tree) for kind, tree in variables.items()}


@functools.partial(jax.jit, static_argnums=(0, 2))
def apply(module, variables, train):
    outputs, batch_stats = from_linen(module).apply(variables, images(), train=train)
    return outputs.logits, batch_stats


def assert_same_function(module, variables, new_module, new_variables, modes=(False, True)):
    """Compares the logits, and the statistics of the channels that both networks have."""
    for train in modes:
        expected, statistics = apply(module, variables, train)
        actual, new_statistics = apply(new_module, new_variables, train)
        magnitude = float(jnp.abs(expected).max())
        assert magnitude > 0.1
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * magnitude)
        for layer, values in statistics.items():
            for name, old in values.items():
                new = new_statistics[layer][name][: len(old)]
                np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("channels", "size", "small", "large"),
    [
        (WIDTH, 11, Net(), Net(width=11)),
        (STREAM, 5, Net(), Net(stream=5)),
        (CNN_CONV, 9, CNN(features=(2, 3), hidden=4), CNN(features=(2, 9), hidden=4)),
        (CNN_HIDDEN, 7, CNN(features=(2, 3), hidden=4), CNN(features=(2, 3), hidden=7)),
    ],
)
def test_widen_keeps_the_function(channels, size, small, large):
    variables = draw(small)
    wide = widen(variables, channels, size, key=jax.random.key(3))
    chex.assert_trees_all_equal_shapes_and_dtypes(wide, shapes(large))
    assert_same_function(small, variables, large, wide)


def test_widen_copies_the_channels_that_the_key_draws():
    variables = draw(Net())
    wide = [
        widen(variables, WIDTH, 12, key=jax.random.key(seed))["params"]["conv1"]["bias"]
        for seed in (0, 0, 1)
    ]
    assert (wide[0] == wide[1]).all() and (wide[0] != wide[2]).any()
    np.testing.assert_array_equal(wide[0][:4], variables["params"]["conv1"]["bias"])
    assert {*np.asarray(wide[0])} == {*np.asarray(wide[0][:4])}


@pytest.mark.parametrize("choose", [leading, largest_norm])
@pytest.mark.parametrize(
    ("channels", "old", "new", "layers"),
    [
        (WIDTH, Net(width=5), Net(width=3), ("conv1", "bn1", "depthwise")),
        (CNN_CONV, CNN(features=(2, 5), hidden=4), CNN(features=(2, 3), hidden=4), ("conv2",)),
    ],
)
def test_narrow_keeps_the_function_if_the_other_channels_are_zero(
    channels, old, new, layers, choose
):
    variables = draw(old)
    nonzero = np.array([True, True, True, False, False])
    if choose is largest_norm:
        nonzero = np.array([False, True, True, False, True])
    for layer in layers:
        for name, leaf in variables["params"][layer].items():
            mask = np.broadcast_to(nonzero, leaf.shape)
            variables["params"][layer][name] = jnp.where(mask, leaf, 0)
    small = narrow(variables, channels, 3, choose=choose)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, shapes(new))
    expected, _ = apply(old, variables, True)
    actual, _ = apply(new, small, True)
    magnitude = float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * magnitude)


def test_largest_norm_worked_by_hand():
    kernel = np.array([[1.0, -5.0, 3.0], [1.0, 2.0, -3.0]])
    second = np.array([[8.0, 0.0, 0.0]])
    np.testing.assert_array_equal(largest_norm([kernel], 2), [1, 2])  # norms 2, 7, 6
    np.testing.assert_array_equal(largest_norm([kernel, second], 2), [0, 1])  # norms 10, 7, 6
    np.testing.assert_array_equal(leading([kernel], 2), [0, 1])
    with pytest.raises(ValueError, match="at least 2 axes"):
        largest_norm([], 2)


def test_channels_vary_fastest_after_a_flatten():
    params = {"a": {"bias": np.array([1, 2, 3])}, "b": {"kernel": np.arange(6)[:, None]}}
    channels = Channels({"a/bias": 0}, {"b/kernel": 0})
    small = narrow(params, channels, 1, choose=lambda kernels, size: np.array([1]))
    np.testing.assert_array_equal(small["a"]["bias"], [2])
    np.testing.assert_array_equal(small["b"]["kernel"], [[1], [4]])


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_results_are_copies_of_the_same_type_and_dtype(make):
    tree = {"a": make(np.ones(3)), "b": make(np.ones((3, 2), jnp.bfloat16)), "c": make(np.ones(4))}
    channels = Channels({"a": 0}, {"b": 0})
    for new in (narrow(tree, channels, 3), widen(tree, channels, 6, key=jax.random.key(0))):
        for name, leaf in new.items():
            assert type(leaf) is type(tree[name]) and leaf.dtype == tree[name].dtype
            assert not np.shares_memory(np.asarray(leaf), np.asarray(tree[name]))


@pytest.mark.parametrize(
    ("channels", "size", "match"),
    [
        (
            Channels({"a": 0, "x": 0}, {"y": 0}),
            1,
            r"no leaves at x, y; its paths are a, b",
        ),
        (Channels({"a": 1}, {"b": -3}), 1, r"axis that does not exist in a \(4,\), b \(4, 6\)"),
        (Channels({"a": 0, "b": 1}, {}), 1, "the same length, got {'a': 4, 'b': 6}"),
        (Channels({}, {"b": 0}), 1, "the same length, got {}"),
        (Channels({"a": 0}, {"b": 1}), 1, "a multiple of the 4 channels, got {'b': 6}"),
    ],
)
def test_invalid_channels_raise(channels, size, match):
    tree = {"a": np.zeros(4), "b": np.zeros((4, 6))}
    with pytest.raises(ValueError, match=match):
        narrow(tree, channels, size)
    with pytest.raises(ValueError, match=match):
        widen(tree, channels, 8, key=jax.random.key(0))


def test_invalid_sizes_raise():
    tree = {"a": np.zeros(4)}
    channels = Channels({"a": 0}, {})
    for size in (0, 5):
        with pytest.raises(
            ValueError, match=f"between 1 and 4, the number of channels, got {size}"
        ):
            narrow(tree, channels, size)
    with pytest.raises(ValueError, match="at least 4, the number of channels, got 3"):
        widen(tree, channels, 3, key=jax.random.key(0))


NEW_LAYERS = {
    "conv": "params/conv3/{leaf}",
    "bn": "{kind}/bn3/{leaf}",
    "dense": "params/hidden/{leaf}",
}


@pytest.mark.parametrize(
    ("extra", "abstract"),
    [
        (("conv",), False),
        (("conv", "bn"), True),
        (("conv", "bn", "dense"), False),
        (("dense",), True),
    ],
)
def test_deepen_keeps_the_function(extra, abstract):
    shallow, deep = Net(), Net(extra=extra)
    variables = draw(shallow)
    target = shapes(deep) if abstract else draw(deep, seed=8)
    result, report = deepen(variables, target, layers=[NEW_LAYERS[name] for name in extra])
    chex.assert_trees_all_equal_shapes_and_dtypes(result, target)
    assert len(report.missing) == 2 * len(extra) + 2 * ("bn" in extra) and not report.unexpected
    # In training mode a new batch norm normalises by its batch, so the function changes.
    modes = (False,) if "bn" in extra else (False, True)
    assert_same_function(shallow, variables, deep, result, modes)


def test_epsilon_of_the_new_batch_norm():
    shape = jax.ShapeDtypeStruct((2,), np.float32)
    target = {
        "params": {"bn": {"scale": shape}},
        "batch_stats": {"bn": {"mean": shape, "var": shape}},
    }
    result, _ = deepen({}, target, layers=["{kind}/bn/{leaf}"], epsilon=0.21)
    np.testing.assert_allclose(result["params"]["bn"]["scale"], 1.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["scale", "rescale_bn", "scale_scale"])
def test_a_new_batch_norm_may_have_scale_in_its_name(name):
    shape = jax.ShapeDtypeStruct((2,), np.float32)
    target = {
        "params": {name: {"scale": shape, "bias": shape}},
        "batch_stats": {name: {"mean": shape, "var": shape}},
    }
    result, _ = deepen({}, target, layers=[f"{{kind}}/{name}/{{leaf}}"], epsilon=0.21)
    np.testing.assert_allclose(result["params"][name]["scale"], 1.1, rtol=1e-6)


def test_a_layer_norm_beside_a_batch_norm_of_a_similar_name_has_no_identity():
    leaf = np.zeros(2)
    target = {"params": {"scale": {"scale": leaf}}, "batch_stats": {"var": {"var": leaf}}}
    with pytest.raises(ValueError, match="no identity is known for params/scale/scale"):
        deepen({}, target, layers=["params/scale/scale"])


def test_deepen_with_renamed_layers():
    source = {"conv1": {"bias": np.ones(2)}, "conv2": {"bias": np.full(2, 2.0)}}
    target = {f"conv{i}": {"bias": np.full(2, 9.0)} for i in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"has values for the new layers, conv2/bias:"):
        deepen(source, target, layers=["conv2/bias"])
    result, _ = deepen(
        source, target, layers=["conv2/bias"], rules=[Rule("conv2/{leaf}", "conv3/{leaf}")]
    )
    assert [result[f"conv{i}"]["bias"][0] for i in (1, 2, 3)] == [1, 0, 2]
    np.testing.assert_array_equal(target["conv2"]["bias"], [9, 9])


def test_deepen_is_strict_except_for_the_new_layers():
    target = {"new": {"bias": np.zeros(2)}, "old": {"bias": np.zeros(2)}}
    with pytest.raises(TransferError) as error:
        deepen({"other": np.zeros(2)}, target, layers=["new/bias"])
    report = error.value.report
    assert report.missing == ("old/bias",) and report.unexpected == ("other",)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ({"kernel": np.zeros((2, 3))}, r"new/kernel has \(2, 3\)"),
        ({"kernel": np.zeros((3, 2, 4, 4))}, r"an odd kernel.*has \(3, 2, 4, 4\)"),
        ({"kernel": np.zeros(2)}, r"has \(2,\)"),
        ({"embedding": np.zeros((2, 2))}, "no identity is known for new/embedding"),
        ({"scale": np.zeros(2), "bias": np.zeros(2)}, "no identity is known for new/scale"),
    ],
)
def test_layers_without_an_identity_raise(layer, match):
    with pytest.raises(ValueError, match=match):
        deepen({}, {"new": layer}, layers=["new/{leaf}"])


def test_new_layers_that_do_not_exist_raise():
    with pytest.raises(ValueError, match=r"'conv3' match nothing in the target"):
        deepen({}, {"conv3": {"bias": np.zeros(2)}}, layers=["conv3"])


def test_narrowed_teacher_initializes_a_student():
    teacher, student = Net(width=5), Net(width=3)
    variables = narrow(draw(teacher), WIDTH, 3, choose=largest_norm)
    _, report = transfer(variables, shapes(student))
    assert report.complete


@pytest.mark.parametrize(
    "indices",
    [[False, True, True, False], [1, 1], [0], [0, 4], [-1, 0], [0.0, 1.0]],
    ids=["mask", "twice", "count", "beyond", "negative", "float"],
)
def test_a_choice_is_one_index_for_each_channel_that_stays(indices):
    params = {"hidden": {"kernel": np.ones((2, 4))}, "out": {"kernel": np.ones((4, 3))}}
    channels = Channels({"hidden/kernel": -1}, {"out/kernel": -2})
    with pytest.raises(ValueError, match=r"must return 2 different indices in \[0, 4\), got"):
        narrow(params, channels, 2, choose=lambda kernels, size: np.array(indices))
    small = narrow(params, channels, 2, choose=lambda kernels, size: [3, 1])
    assert small["out"]["kernel"].shape == (2, 3)
