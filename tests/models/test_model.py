"""Models as pairs of pure functions, from Flax Linen and Flax NNX."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkd.distill.step import init_train_state, make_train_step
from jaxkd.models import (
    CNN,
    Outputs,
    from_linen,
    from_nnx,
    with_class_order,
    with_compute_dtype,
    with_input_normalization,
)
from jaxkd.models.wrappers import with_frozen_batch_stats


class Net(nn.Module):
    """A module with batch statistics, dropout and a sown feature."""

    @nn.compact
    def __call__(self, x, training):
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(nn.Dense(8)(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        hidden = self.norm(self.dense(x))
        return Outputs(self.out(self.dropout(hidden)), {"hidden": hidden})


def inputs():
    return jax.random.normal(jax.random.key(9), (16, 4))


MAKERS = {
    "linen": lambda: from_linen(Net(), train_argument="training"),
    "nnx": lambda: from_nnx(lambda rngs: NNXNet(rngs=rngs)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_pair_is_pure_and_separates_training_from_evaluation(maker):
    model = MAKERS[maker]()
    variables = model.init(jax.random.key(0), inputs())
    assert type(variables["params"]) is dict and set(variables) == {"params", "batch_stats"}
    chex.assert_trees_all_equal(variables, model.init(jax.random.key(0), inputs()))
    before = jax.tree.map(jnp.copy, variables)
    apply = jax.jit(model.apply, static_argnames="train")

    evaluated, unchanged = apply(variables, inputs(), train=False)
    chex.assert_shape(evaluated.logits, (16, 3))
    assert list(evaluated.features) == ["hidden"]
    chex.assert_shape(evaluated.features["hidden"], (16, 8))
    chex.assert_trees_all_equal(unchanged, variables["batch_stats"])

    first, updated = apply(variables, inputs(), train=True, key=jax.random.key(1))
    repeated, _ = apply(variables, inputs(), train=True, key=jax.random.key(1))
    other, _ = apply(variables, inputs(), train=True, key=jax.random.key(2))
    chex.assert_trees_all_equal(first, repeated)
    assert (first.logits != other.logits).any(), "dropout must follow the key"
    chex.assert_trees_all_equal_shapes(updated, unchanged)
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(unchanged), strict=True)
    )
    chex.assert_trees_all_equal(variables, before)


def test_linen_and_nnx_agree_on_the_same_weights():
    linen, nnx_model = MAKERS["linen"](), MAKERS["nnx"]()
    nnx_variables = nnx_model.init(jax.random.key(0), inputs())
    names = {"Dense_0": "dense", "BatchNorm_0": "norm", "Dense_1": "out"}
    linen_variables = {
        kind: {new: tree[old] for new, old in names.items() if old in tree}
        for kind, tree in nnx_variables.items()
    }
    expected, _ = nnx_model.apply(nnx_variables, inputs(), train=False)
    actual, _ = linen.apply(linen_variables, inputs(), train=False)
    chex.assert_trees_all_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_init_of_an_nnx_module_returns_its_weights():
    module = NNXNet(rngs=nnx.Rngs(3))
    model = from_nnx(module)
    variables = model.init(jax.random.key(0), inputs())
    chex.assert_trees_all_equal(variables["params"]["out"]["bias"], jnp.zeros(3))
    module.eval()
    outputs, _ = model.apply(variables, inputs(), train=False)
    chex.assert_trees_all_close(outputs.logits, module(inputs()).logits, rtol=1e-5, atol=1e-6)
    model.apply(variables, inputs(), train=True, key=jax.random.key(1))
    chex.assert_trees_all_equal(
        nnx.state(module, nnx.BatchStat), nnx.state(NNXNet(rngs=nnx.Rngs(3)), nnx.BatchStat)
    )


def test_module_without_a_training_mode():
    with pytest.raises(TypeError, match="has no argument 'train'.*train_argument=None"):
        from_linen(nn.Dense(3))
    model = from_linen(nn.Dense(3), train_argument=None)
    variables = model.init(jax.random.key(0), inputs())
    outputs, batch_stats = model.apply(variables, inputs(), train=True)
    chex.assert_shape(outputs.logits, (16, 3))
    assert outputs.features == {} and batch_stats == {}


class Repeated(nn.Module):
    """Sows one name twice, of two shapes."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "hidden", x)
        self.sow("intermediates", "hidden", x[:, :1])
        return x


def test_repeated_features_are_numbered():
    outputs, _ = from_linen(Repeated(), train_argument=None).apply(
        {"params": {}}, inputs(), train=False
    )
    assert {name: value.shape for name, value in outputs.features.items()} == {
        "hidden/0": (16, 4),
        "hidden/1": (16, 1),
    }


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.variable("cache", "bias", jnp.zeros, (4,)).value[None]


def test_other_collections_raise():
    with pytest.raises(
        ValueError, match="in params and batch_stats only, but Cached also keeps cache"
    ):
        from_linen(Cached(), train_argument=None).init(jax.random.key(0), inputs())


def test_input_normalization_takes_uint8_images():
    images = jax.random.randint(jax.random.key(0), (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    plain = from_linen(CNN(features=(4,), hidden=4))
    model = with_input_normalization(plain, mean, std)
    normalized = (np.asarray(images, np.float32) / 255 - mean.reshape(1, 1, 1, 3)) / std.reshape(
        1, 1, 1, 3
    )
    variables = model.init(jax.random.key(1), images)
    chex.assert_trees_all_equal(variables, plain.init(jax.random.key(1), jnp.asarray(normalized)))
    actual, _ = model.apply(variables, images, train=False)
    expected, _ = plain.apply(variables, jnp.asarray(normalized), train=False)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_half_precision_computes_in_bfloat16_and_trains_in_float32():
    """Weights, statistics, gradients and logits are float32; features are bfloat16."""
    plain = from_linen(CNN(features=(4, 8), hidden=8))
    half = with_compute_dtype(plain, jnp.bfloat16)
    tx = optax.sgd(1.0)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    variables = half.init(jax.random.key(1), images)
    chex.assert_trees_all_equal(variables, plain.init(jax.random.key(1), images))
    with jax.numpy_dtype_promotion("standard"):
        rough, _ = half.apply(variables, images, train=False)
        exact, _ = plain.apply(variables, images, train=False)
        step = make_train_step(
            half,
            tx,
            lambda student, teachers, batch, context: jnp.square(student.logits - 1).sum(-1),
        )
        state, metrics = step(
            init_train_state(variables, tx), {"inputs": images}, (), jax.random.key(2)
        )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in rough.features.values())
    assert rough.logits.dtype == metrics["loss"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert 1e-4 < np.abs(rough.logits - exact.logits).max() < 0.05
    changes = jax.tree.map(
        lambda before, after: np.abs(after - before).max(), variables["params"], state.params
    )
    assert all(change > 0 for change in jax.tree.leaves(changes))


@pytest.mark.parametrize(
    ("dtype", "name"), [(jnp.int8, "int8"), ("int32", "int32"), (bool, "bool"), (None, "None")]
)
def test_a_compute_dtype_must_be_floating_point(dtype, name):
    """Weights cast to integers are zero, and so are the logits."""
    with pytest.raises(TypeError, match=f"dtype must be floating-point, got {name}: pass"):
        with_compute_dtype(from_linen(CNN()), dtype)


@pytest.mark.parametrize("maker", MAKERS)
def test_frozen_batch_stats_are_used_and_unchanged_in_training(maker):
    model = MAKERS[maker]()
    frozen = with_frozen_batch_stats(model)
    variables = model.init(jax.random.key(0), inputs())
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    chex.assert_trees_all_equal(
        frozen.init(jax.random.key(0), inputs()), model.init(jax.random.key(0), inputs())
    )
    expected, _ = model.apply(variables, inputs(), train=False)
    for train in (False, True):
        outputs, batch_stats = frozen.apply(variables, inputs(), train=train, key=jax.random.key(1))
        chex.assert_trees_all_equal(outputs, expected)
        chex.assert_trees_all_equal(batch_stats, variables["batch_stats"])


def test_frozen_batch_stats_leave_scale_and_bias_trainable():
    model = with_frozen_batch_stats(MAKERS["linen"]())
    variables = model.init(jax.random.key(0), inputs())
    tx = optax.sgd(0.1)
    step = make_train_step(
        model, tx, lambda student, teachers, batch, context: jnp.square(student.logits - 1).sum(-1)
    )
    state, _ = step(init_train_state(variables, tx), {"inputs": inputs()}, (), jax.random.key(1))
    chex.assert_trees_all_equal(state.batch_stats, variables["batch_stats"])
    for before, after in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(state.params), strict=True
    ):
        assert (before != after).any()


def test_class_order_moves_the_logits_alone():
    model = from_nnx(lambda rngs: NNXNet(rngs=rngs))
    variables = model.init(jax.random.key(0), inputs())
    key = jax.random.key(1)
    expected, expected_stats = model.apply(variables, inputs(), train=True, key=key)
    ordered = with_class_order(model, [2, 0, 1])
    outputs, batch_stats = jax.jit(ordered.apply, static_argnames="train")(
        variables, inputs(), train=True, key=key
    )
    np.testing.assert_allclose(outputs.logits, expected.logits[:, [2, 0, 1]], atol=1e-5)
    chex.assert_trees_all_close(
        (outputs.features, batch_stats), (expected.features, expected_stats), atol=1e-5
    )


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 3]])
def test_class_order_is_a_permutation(order):
    model = with_class_order(from_nnx(lambda rngs: NNXNet(rngs=rngs)), order)
    variables = model.init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match=f"order of {len(order)} classes is not one of the mod"):
        model.apply(variables, inputs(), train=False)


class Deterministic(nn.Module):
    """Flax's own name for the opposite of training."""

    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(x)


class Mode(nn.Module):
    @nn.compact
    def __call__(self, x, inference):
        return nn.Dropout(0.5, deterministic=inference)(x)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Deterministic(), {"train_argument": "deterministic"}),
        (Mode(), {"train_argument": "inference", "train_value": False}),
    ],
)
def test_an_argument_that_is_false_in_training(module, options):
    model = from_linen(module, **options)
    assert model.init(jax.random.key(0), inputs())["params"] == {}
    for train in (False, True):
        outputs, _ = model.apply({"params": {}}, inputs(), train=train, key=jax.random.key(1))
        assert bool((outputs.logits == 0).any()) == train, "only training drops values"


def test_the_sense_of_an_unknown_argument_is_asked():
    with pytest.raises(TypeError, match="'inference' of Mode.__call__ true in training or in eval"):
        from_linen(Mode(), train_argument="inference")
    with pytest.raises(TypeError, match="no argument 'train': pass train_argument='deterministic'"):
        from_linen(Deterministic())


class NNXTrain(nnx.Module):
    """An argument of the call tells the mode, which `train()` and `eval()` do not reach."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=True):
        return self.dropout(x, deterministic=not train)


class NNXTraining(NNXTrain):
    def __call__(self, x, *, training):
        return super().__call__(x, training)


class NNXIsTraining(NNXTrain):
    def __call__(self, x, is_training, scale=1.0):
        return super().__call__(x * scale, is_training)


class NNXDeterministic(NNXTrain):
    def __call__(self, x, deterministic=False):
        return super().__call__(x, not deterministic)


class NNXTwoArguments(NNXTrain):
    def __call__(self, x, train=None, deterministic=None):
        assert train is not deterministic
        return super().__call__(x, train)


class NNXJitted(NNXTrain):
    @functools.partial(nnx.jit, static_argnames="train")
    def __call__(self, x, train=True):
        return self.dropout(x, deterministic=not train)


@pytest.mark.parametrize(
    "module",
    [NNXTrain, NNXTraining, NNXIsTraining, NNXDeterministic, NNXTwoArguments, NNXJitted],
)
def test_an_argument_of_an_nnx_module_follows_the_mode(module):
    model = from_nnx(module)
    for train in (False, True):
        outputs, _ = model.apply(
            model.init(jax.random.key(0), inputs()), inputs(), train=train, key=jax.random.key(1)
        )
        assert bool((outputs.logits == 0).any()) == train, "only training drops values"


def test_running_statistics_of_an_nnx_module_follow_the_argument():
    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

        def __call__(self, x, use_running_average=True):
            return self.norm(x, use_running_average=use_running_average)

    model = from_nnx(Normalized)
    variables = model.init(jax.random.key(0), inputs())
    moved = {
        train: model.apply(variables, inputs(), train=train)[1]["norm"]["mean"].any()
        for train in (False, True)
    }
    assert moved == {False: False, True: True}


class NNXMask(NNXTrain):
    def __call__(self, x, mask, train=True):
        return super().__call__(x * mask, train)


class LinenMask(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        return nn.Dense(3)(x * mask)


@pytest.mark.parametrize("make", [lambda: from_nnx(NNXMask), lambda: from_linen(LinenMask())])
def test_an_unknown_argument_without_a_default_is_refused(make):
    with pytest.raises(TypeError, match="Mask.__call__ needs 'mask' beside its inputs.*a default"):
        make()


def test_arguments_with_defaults_and_variadic_ones_are_left_alone():
    """Flax's own layers have arguments such as `mask`, and `Sequential` takes any."""
    module = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    for model in (from_nnx(module), from_linen(nn.Sequential([nn.Dense(3)]), train_argument=None)):
        variables = model.init(jax.random.key(0), inputs())
        outputs, _ = model.apply(variables, inputs(), train=True)
        chex.assert_shape(outputs.logits, (16, 3))


class ReturnsPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), {"hidden": x}


class NNXPair(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x), {"hidden": x}


@pytest.mark.parametrize(
    "make", [lambda: from_linen(ReturnsPair(), train_argument=None), lambda: from_nnx(NNXPair)]
)
def test_other_outputs_are_refused_with_the_line_to_write(make):
    model = make()
    variables = model.init(jax.random.key(0), inputs())
    with pytest.raises(TypeError, match=r"a tuple: .*`return models.Outputs\(logits, features\)`"):
        jax.eval_shape(lambda x: model.apply(variables, x, train=False), inputs())


class UpdatesAlways(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=False)(x)


class AddsNoise(nn.Module):
    always: bool = False

    @nn.compact
    def __call__(self, x, train):
        is_noisy = train or self.always
        return x + jax.random.normal(self.make_rng("noise"), x.shape) if is_noisy else x


def test_a_module_that_updates_statistics_in_evaluation_is_refused():
    model = from_linen(UpdatesAlways())
    variables = {
        "params": {"BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
        "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
    }
    _, batch_stats = model.apply(variables, inputs(), train=True)
    assert batch_stats["BatchNorm_0"]["mean"].any()
    message = "UpdatesAlways changes its variables in evaluation.* use_running_average=not train"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, inputs(), train=False)


def test_a_module_draws_under_any_name_in_training():
    model = from_linen(AddsNoise())
    first, second, other = (
        model.apply({"params": {}}, inputs(), train=True, key=jax.random.key(seed))[0].logits
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    with pytest.raises(ValueError, match="in training without a key: pass key="):
        model.apply({"params": {}}, inputs(), train=True)


def test_a_module_that_draws_in_evaluation_is_refused():
    with pytest.raises(ValueError, match="AddsNoise draws random numbers in evaluation: draw only"):
        from_linen(AddsNoise(always=True)).apply({"params": {}}, inputs(), train=False)


class SowsAndReturnsOutputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "sown", 2 * x)
        self.sow("intermediates", "both", 3 * x)
        return Outputs(x, {"both": x})


def test_sown_values_join_the_features_of_outputs():
    model = from_linen(SowsAndReturnsOutputs(), train_argument=None)
    outputs, _ = model.apply({"params": {}}, inputs(), train=False)
    chex.assert_trees_all_equal(outputs.features, {"sown": 2 * inputs(), "both": inputs()})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint16])
def test_input_normalization_asks_for_the_scale_of_other_dtypes(dtype):
    plain = from_linen(CNN(features=(4,), hidden=4))
    images = jnp.ones((2, 8, 8, 3), jnp.uint8)
    mean, std = [0.5] * 3, [0.2] * 3
    model = with_input_normalization(plain, mean, std)
    variables = model.init(jax.random.key(1), images)
    with pytest.raises(TypeError, match=f"expects uint8 images, got {jnp.dtype(dtype)}: .* 1.0 "):
        jax.eval_shape(lambda x: model.apply(variables, x, train=False), images.astype(dtype))
    unit = with_input_normalization(plain, mean, std, max_value=1.0)
    bytes_ = with_input_normalization(plain, mean, std, max_value=255.0)
    expected, _ = model.apply(variables, 255 * images, train=False)
    for scaled, other in ((images, unit), (255 * images, bytes_)):
        actual, _ = other.apply(variables, scaled.astype(dtype), train=False)
        chex.assert_trees_all_close(actual, expected, rtol=0.02, atol=0.02)


def test_input_normalization_takes_one_array():
    model = with_input_normalization(from_linen(CNN()), [0.5] * 3, [0.2] * 3)
    with pytest.raises(TypeError, match="expects uint8 images, got dict"):
        model.init(jax.random.key(0), {"images": jnp.ones((1, 8, 8, 3), jnp.uint8)})
    with pytest.raises(ValueError, match="max_value must be positive, got 0"):
        with_input_normalization(from_linen(CNN()), [0.5] * 3, [0.2] * 3, max_value=0)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([123.7], [58.4], r"mean must be within \[0, 1\], got 123.7: .* such as 123.7 / 255"),
        ([0.5, -0.1, 0.5], [0.2] * 3, r"mean must be within \[0, 1\], got -0.1"),
        ([0.5, np.nan, 0.5], [0.2] * 3, r"mean must be within \[0, 1\], got nan"),
        ([0.5] * 3, [0.2, 58.4, 0.2], r"std must be within \(0, 1\], got 58.4: .* 58.4 / 255"),
        ([0.5] * 3, [0.2, 0.0, 0.2], r"std must be within \(0, 1\], got 0"),
        ([0.5] * 3, [-0.2] * 3, r"std must be within \(0, 1\], got -0.2"),
        ([0.5] * 3, [np.nan] * 3, r"std must be within \(0, 1\], got nan"),
    ],
)
@pytest.mark.parametrize("max_value", [None, 1.0, 255.0])
def test_statistics_of_another_scale_are_refused(mean, std, message, max_value):
    """Those of pixels in [0, 255] would make every image nearly the same."""
    with pytest.raises(ValueError, match=message) as caught:
        with_input_normalization(from_linen(CNN()), mean, std, max_value=max_value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize(("mean", "std"), [([0.0, 1.0, 0.5], [1.0, 1e-3, 1 / 255]), (0.5, 0.25)])
def test_statistics_at_the_ends_and_numbers_for_all_channels(mean, std):
    identity = from_linen(nn.Sequential([lambda x: x]), train_argument=None)
    images = jnp.array([[[[0, 255, 51]]]], jnp.uint8)
    outputs, _ = with_input_normalization(identity, mean, std).apply({}, images, train=False)
    expected = (np.array([0.0, 1.0, 0.2]) - mean) / std
    np.testing.assert_allclose(outputs.logits[0, 0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_value", [1.0, 16, 256.0])
def test_bytes_of_another_scale_are_refused(max_value):
    model = with_input_normalization(from_linen(CNN()), 0.5, 0.2, max_value=max_value)
    images = jnp.ones((1, 8, 8, 3), jnp.uint8)
    message = f"uint8 images are divided by 255, but max_value is {max_value}: .*float32"
    for call in (
        lambda: model.init(jax.random.key(0), images),
        lambda: jax.eval_shape(lambda x: model.apply({}, x, train=False), images),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("mean", "std", "channels", "message"),
    [
        ([0.5] * 3, [0.2] * 3, 1, "mean has 3 values, but the images have 1 channel:"),
        ([0.5], [0.2] * 3, 3, "mean has 1 value, but the images have 3 channels:"),
        ([0.5] * 3, [0.2] * 2, 3, "std has 2 values, but the images have 3 channels:"),
    ],
)
def test_statistics_of_other_channels_are_refused(mean, std, channels, message):
    """One channel would be repeated without a word."""
    model = with_input_normalization(from_linen(CNN()), mean, std)
    with pytest.raises(ValueError, match=message) as caught:
        model.init(jax.random.key(0), jnp.ones((1, 8, 8, channels), jnp.uint8))
    assert "\n" not in str(caught.value)


class NNXNoise(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        return self.dense(x) + jax.random.normal(self.rngs.noise(), (len(x), 3))


class NNXOwnDropout(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rng_collection="aug", rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


@pytest.mark.parametrize(
    "module",
    [NNXNoise(nnx.Rngs(params=0, noise=1)), NNXOwnDropout(nnx.Rngs(params=0, aug=3))],
    ids=["noise", "aug"],
)
def test_the_key_reaches_every_random_stream_of_an_nnx_module(module):
    model = from_nnx(module)
    variables = model.init(jax.random.key(0), inputs())
    first, repeated, other = (
        np.asarray(model.apply(variables, inputs(), train=True, key=jax.random.key(seed))[0].logits)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, repeated)
    assert (first != other).any()


class NNXMean(nnx.Variable):
    pass


class NNXOwnState(nnx.Module):
    def __init__(self, rngs, *, updates):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.mean = NNXMean(jnp.zeros(4))
        self.updates = updates

    def __call__(self, x):
        if self.updates:
            self.mean[...] = self.mean[...] + x.mean(0)
        return self.dense(x - self.mean[...][None])


@pytest.mark.parametrize("train", [True, False])
def test_an_update_of_a_variable_that_no_model_keeps_is_refused(train):
    model = from_nnx(lambda rngs: NNXOwnState(rngs, updates=True))
    variables = model.init(jax.random.key(0), inputs())
    apply = jax.jit(functools.partial(model.apply, train=train))
    with pytest.raises(ValueError, match=r"changes mean in a call.*nnx.BatchStat"):
        apply(variables, inputs(), key=jax.random.key(1))
    constant = from_nnx(lambda rngs: NNXOwnState(rngs, updates=False))
    assert constant.apply(variables, inputs(), train=train)[0].logits.shape == (len(inputs()), 3)


def test_a_model_is_normalised_once():
    """Twice would divide by 255 twice, as a teacher of a run that is wrapped again."""
    network = from_linen(CNN(features=(4,), hidden=8))
    once = with_input_normalization(network, 0.5, 0.25)
    for model in (once, with_compute_dtype(once, jnp.float32)):
        for max_value in (None, 1.0):
            with pytest.raises(ValueError, match="normalises its inputs already: pass it as it is"):
                with_input_normalization(model, 0.5, 0.25, max_value=max_value)


def test_images_without_an_axis_of_channels_are_named():
    network = from_linen(CNN(features=(4,), hidden=8))
    model = with_input_normalization(network, [0.5], [0.25])
    with pytest.raises(ValueError, match=r"must be \[B, H, W, C\], got \[5, 28, 28\]: add an axis"):
        model.init(jax.random.key(0), jnp.zeros((5, 28, 28), jnp.uint8))
