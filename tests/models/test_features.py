"""Outputs of submodules as features, by path, for Linen and NNX."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxkd import models
from jaxkd.models import Outputs, feature_paths, from_linen, from_nnx

KEY = jax.random.key(0)


class Block(nn.Module):
    """A block as torchvision writes it, with layers made in `setup`."""

    width: int

    def setup(self):
        self.conv = nn.Conv(self.width, (3, 3))
        self.bn = nn.BatchNorm(momentum=0.5)

    def __call__(self, x, train):
        return x + nn.relu(self.bn(self.conv(x), use_running_average=not train))


class Network(nn.Module):
    """Takes a dict, and returns a feature of its own."""

    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Conv(4, (3, 3), name="stem")(inputs["image"])
        for i in range(2):
            x = Block(4, name=f"layers_{i}")(x, train)
        self.sow("intermediates", "sown", x)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return Outputs(nn.Dense(3)(x), {"pooled": x})


class NNXBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.bn(self.conv(x)))


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        blocks = [NNXBlock(4, rngs) for _ in range(2)]
        self.layers = nnx.List(blocks) if hasattr(nnx, "List") else blocks
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs):
        x = self.stem(inputs["image"])
        for block in self.layers:
            x = block(x)
        x = self.dropout(x.mean((1, 2)))
        return Outputs(self.head(x), {"pooled": x, "sown": x})


MAKERS = {
    "linen": (functools.partial(from_linen, Network()), "layers_0/conv", "Dense_0"),
    "nnx": (functools.partial(from_nnx, NNXNetwork), "layers/0/conv", "head"),
}


def batch():
    return {"image": jax.random.normal(jax.random.key(9), (2, 8, 8, 3))}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_of_submodules_join_the_features(kind):
    make, conv, head = MAKERS[kind]
    plain, model = make(), make(features={"first": conv, "head": head})
    variables = plain.init(KEY, batch())
    chex.assert_trees_all_equal(model.init(KEY, batch()), variables)
    options = {"train": True, "key": jax.random.key(1)}
    apply_plain, apply = (
        jax.jit(functools.partial(pair.apply, **options)) for pair in (plain, model)
    )
    expected, batch_stats = apply_plain(variables, batch())
    outputs, updated = apply(variables, batch())
    assert set(outputs.features) == {"pooled", "sown", "first", "head"}
    chex.assert_shape(outputs.features["first"], (2, 8, 8, 4))
    chex.assert_trees_all_close(
        (outputs.logits, updated), (expected.logits, batch_stats), rtol=1e-5
    )
    chex.assert_trees_all_equal(outputs.features["head"], outputs.logits)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_flow_through_a_selected_feature(kind):
    make, conv, _ = MAKERS[kind]
    model = make(features=(conv,))
    variables = model.init(KEY, batch())

    def loss(params):
        outputs, _ = model.apply({**variables, "params": params}, batch(), train=False)
        return optax.l2_loss(outputs.features[conv]).sum()

    gradients = jax.grad(loss)(variables["params"])
    block = gradients["layers"][0] if kind == "nnx" else gradients["layers_0"]
    assert jnp.abs(block["conv"]["kernel"]).sum() > 0
    assert jnp.abs(gradients["stem"]["kernel"]).sum() > 0
    head = gradients["head" if kind == "nnx" else "Dense_0"]
    chex.assert_trees_all_equal(head, jax.tree.map(jnp.zeros_like, head))


@pytest.mark.parametrize("kind", MAKERS)
def test_selection_costs_nothing_where_nothing_is_selected(kind):
    make, conv, _ = MAKERS[kind]
    plain, model = make(), make(features=(conv,))
    variables = plain.init(KEY, batch())

    def lower(model):
        def logits(variables, batch):
            return model.apply(variables, batch, train=False)[0].logits

        return jax.jit(logits).lower(variables, batch()).as_text()

    assert lower(model) == lower(plain)


def test_paths_are_listed_in_the_order_of_the_network():
    shapes = feature_paths(from_linen(Network()), batch())
    expected = [
        *("stem", "layers_0", "layers_0/conv", "layers_0/bn"),
        *("layers_1", "layers_1/conv", "layers_1/bn", "Dropout_0", "Dense_0"),
    ]
    assert list(shapes) == expected
    assert shapes["layers_0/conv"] == (2, 8, 8, 4)
    normalized = models.with_frozen_batch_stats(from_linen(Network(), features=("nowhere",)))
    assert feature_paths(normalized, batch()) == shapes
    names = [name.replace("layers_", "layers/") for name in expected]
    nnx_names = [*names[:-2], "dropout", "head"]
    shapes = feature_paths(from_nnx(NNXNetwork), batch())
    assert list(shapes) == nnx_names
    assert shapes["layers/1"] == (2, 8, 8, 4)


def test_only_models_of_flax_modules_have_paths():
    model = models.Model(lambda key, x: {}, lambda variables, x, *, train, key=None: (x, {}))
    with pytest.raises(TypeError, match="from_linen and from_nnx"):
        feature_paths(model, jnp.ones(2))


class Several(nn.Module):
    """Calls a layer twice, and a layer that returns two arrays and a dict."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="twice")
        x = layer(layer(x))
        return Pair(name="pair")(x)[0]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, {"doubled": 2 * x}


class NNXPair(nnx.Module):
    def __call__(self, x):
        return x, {"doubled": 2 * x}


class NNXSeveral(nnx.Module):
    def __init__(self, rngs):
        self.twice = nnx.Linear(4, 4, rngs=rngs)
        self.pair = NNXPair()

    def __call__(self, x):
        return self.pair(self.twice(self.twice(x)))[0]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(from_linen, Several(), train_argument=None),
        functools.partial(from_nnx, NNXSeveral),
    ],
)
def test_several_outputs_are_numbered_and_can_be_selected(make):
    x = jnp.ones((2, 4))
    variables = make().init(KEY, x)
    names = ["twice/0", "twice/1", "pair/0", "pair/1/doubled"]
    assert list(feature_paths(make(), x)) == names
    all_outputs, _ = make(features=("twice", "pair")).apply(variables, x, train=False)
    assert sorted(all_outputs.features) == sorted(names)
    chosen, _ = make(features={"last": "twice/1", "d": "pair/1/doubled"}).apply(
        variables, x, train=False
    )
    chex.assert_trees_all_equal(
        chosen.features,
        {"last": all_outputs.logits, "d": 2 * all_outputs.logits},
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)


# One class for all calls, because it holds the cache of the traces.
JittedLayer = nn.jit(Layer)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Layer(name="layer")(x), None


class Transformed(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "remat":
            return nn.remat(Layer)(name="layer")(x)
        if self.kind == "jit":
            return JittedLayer(name="layer")(x)
        axes = {"params": 0} | ({"intermediates": 0} if self.kind == "scan" else {})
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(name="steps")(x, None)[0]


@pytest.mark.parametrize(
    ("kind", "path", "shape"),
    [
        ("remat", "layer/dense", (2, 4)),
        ("jit", "layer/dense", (2, 4)),
        ("scan", "steps/layer/dense", (3, 2, 4)),
    ],
)
def test_features_leave_linen_transformations(kind, path, shape):
    x = jnp.ones((2, 4))
    make = functools.partial(from_linen, Transformed(kind), train_argument=None)
    variables = make().init(KEY, x)
    # What `nn.jit` has traced without recording must not be used with it, nor the reverse.
    for features, names in [((), []), ((path,), [path]), ((), [])]:
        outputs, _ = make(features=features).apply(variables, x, train=False)
        assert list(outputs.features) == names
    outputs, _ = make(features=(path,)).apply(variables, x, train=False)
    chex.assert_shape(outputs.features[path], shape)
    last = outputs.features[path].reshape(-1, 2, 4)[-1]
    chex.assert_trees_all_close(last, outputs.logits, rtol=1e-6)


def test_a_scan_that_lets_nothing_out_is_named_with_the_remedy():
    x = jnp.ones((2, 4))
    model = from_linen(Transformed("closed"), train_argument=None, features=("steps/layer",))
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match="variable_axes={..., 'intermediates': 0}"):
        model.apply(variables, x, train=False)
    assert feature_paths(model, x) == {}


class NNXJitted(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.jit(lambda layer, x: layer(x))(self.layer, x)


class NNXRemat(NNXJitted):
    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


class NNXScan(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))
        self.layer = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layer)


@pytest.mark.parametrize(
    ("module", "shape"), [(NNXJitted, (2, 4)), (NNXRemat, (2, 4)), (NNXScan, (3, 2, 4))]
)
def test_features_leave_nnx_transformations(module, shape):
    x = jnp.ones((2, 4))
    model = from_nnx(module, features=("layer",))
    outputs, _ = model.apply(model.init(KEY, x), x, train=False)
    chex.assert_shape(outputs.features["layer"], shape)
    chex.assert_trees_all_close(
        outputs.features["layer"].reshape(-1, 2, 4)[-1], outputs.logits, rtol=1e-6
    )


class NNXAlias(NNXNetwork):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.alias = self.stem


def test_an_nnx_submodule_has_all_its_paths_and_stays_as_it_was():
    module = NNXAlias(nnx.Rngs(0))
    model = from_nnx(module, features={"a": "stem", "b": "alias"})
    outputs, _ = model.apply(model.init(KEY, batch()), batch(), train=False)
    chex.assert_trees_all_equal(outputs.features["a"], outputs.features["b"])
    assert "alias" not in feature_paths(model, batch())
    assert type(module.stem) is nnx.Conv and not hasattr(module.stem, "jaxkd_outputs")


@pytest.mark.parametrize("transform", [jax.vmap, jax.checkpoint])
@pytest.mark.parametrize("kind", MAKERS)
def test_features_under_transformations_of_jax(kind, transform):
    make, conv, _ = MAKERS[kind]
    model = make(features=(conv,))
    variables = model.init(KEY, batch())

    def feature(images):
        return model.apply(variables, {"image": images}, train=False)[0].features[conv]

    images = batch()["image"]
    stacked = images[None] if transform is jax.vmap else images
    actual = transform(feature)(stacked)
    chex.assert_trees_all_close(actual.reshape(feature(images).shape), feature(images), rtol=1e-4)


def apply_linen(features, module=None):
    model = from_linen(module or Network(), features=features)
    return model.apply(from_linen(Network()).init(KEY, batch()), batch(), train=False)


def apply_nnx(features):
    x = jnp.ones((2, 4))
    model = from_nnx(NNXJitted, features=features)
    return model.apply(model.init(KEY, x), x, train=False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: apply_linen(("layer_0/conv",)), ValueError, "similar ones are layers_0/conv"),
        (lambda: apply_linen({"pooled": "stem"}), ValueError, "of its own named pooled"),
        (lambda: from_linen(Network(), features="stem"), TypeError, r"\"Dense_0\",\)"),
        (lambda: from_linen(Network(), features=5), TypeError, "features is 5: pass a tuple"),
        (lambda: from_linen(Network(), features={"a": 1}), TypeError, "are texts, got 'a': 1"),
        (lambda: from_nnx(NNXNetwork, features=("layers.0.conv",)), ValueError, "layers/0/conv"),
        (lambda: from_nnx(NNXNetwork, features=("layers",)), ValueError, "layers/0"),
        (lambda: apply_nnx(("unused",)), ValueError, "'unused' in NNXJitted .* is not called"),
        (lambda: apply_nnx(("layer/5",)), ValueError, "'layer/5' in NNXJitted"),
    ],
)
def test_wrong_selections_are_refused_in_a_line(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert len(str(raised.value)) <= 300 and "\n" not in str(raised.value)
