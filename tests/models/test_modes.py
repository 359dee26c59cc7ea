"""What tells a module whether it trains, and what is said if nothing does."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxkd.models import CNN, from_linen, from_nnx, with_frozen_batch_stats


class Body(nn.Module):
    """Layers that depend on the mode, behind arguments that the tests name."""

    def compute(self, x, *, norm, drop):
        x = nn.BatchNorm(use_running_average=not norm)(nn.Dense(8)(x))
        return nn.Dropout(0.5, deterministic=not drop)(x)


class Train(Body):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return self.compute(x, norm=train, drop=train)


class TrainAndDeterministic(Body):
    @nn.compact
    def __call__(self, x, train: bool = False, deterministic: bool = True):
        return self.compute(x, norm=train, drop=not deterministic)


class DropoutIsFixed(Body):
    @nn.compact
    def __call__(self, x, train):
        return self.compute(x, norm=train, drop=False)


class StatisticsAreFixed(Body):
    @nn.compact
    def __call__(self, x, train):
        return self.compute(x, norm=False, drop=train)


class ModeIsFixed(Body):
    @nn.compact
    def __call__(self, x, mode="eval"):
        return self.compute(x, norm=mode == "train", drop=mode == "train")


class TrainAttribute(Body):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return self.compute(x, norm=self.train, drop=self.train)


class Inference(nn.Module):
    def __call__(self, x, inference: bool = True):
        return x if inference else 2 * x


class NNXBody(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def compute(self, x, *, norm, drop):
        x = self.norm(x, use_running_average=not norm)
        return self.dropout(x, deterministic=not drop)


class NNXIsTrain(NNXBody):
    def __call__(self, x, is_train=False):
        return self.compute(x, norm=is_train, drop=is_train)


class NNXDropoutIsFixed(NNXBody):
    def __call__(self, x, train=False):
        return self.compute(x, norm=train, drop=False)


class NNXModeIsFixed(NNXBody):
    def __call__(self, x, mode="eval"):
        return self.compute(x, norm=mode == "train", drop=mode == "train")


class NNXInference(NNXBody):
    def __call__(self, x, inference: bool = True):
        return self.compute(x, norm=not inference, drop=not inference)


class NNXTrainingAttribute(NNXBody):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.training = False

    def __call__(self, x):
        return self.compute(x, norm=self.training, drop=self.training)


def compute(model, *, train=True):
    """Returns the logits and statistics of a model that is applied under jit, as steps do."""
    x = jax.random.normal(jax.random.key(9), (8, 4))
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def apply(variables, key):
        outputs, batch_stats = model.apply(variables, x, train=train, key=key)
        return outputs.logits, batch_stats

    logits, batch_stats = apply(variables, jax.random.key(1))
    means = zip(
        jax.tree.leaves(batch_stats), jax.tree.leaves(variables["batch_stats"]), strict=True
    )
    return {"drops": bool((logits == 0).any()), "moves": any((a != b).any() for a, b in means)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: from_linen(Train()),
        lambda: from_linen(TrainAndDeterministic()),
        lambda: from_linen(TrainAndDeterministic(), train_argument="deterministic"),
        lambda: from_nnx(NNXIsTrain),
        lambda: from_nnx(NNXInference, train_argument="inference", train_value=False),
    ],
)
def test_all_arguments_that_tell_the_mode_follow_it(make):
    model = make()
    assert compute(model) == {"drops": True, "moves": True}
    assert compute(model, train=False) == {"drops": False, "moves": False}


def test_an_argument_that_tells_the_mode_must_be_passed():
    with pytest.raises(TypeError, match="Train.__call__ has the argument 'train': pass train_arg"):
        from_linen(Train(), train_argument=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_linen(Inference()), "has no argument 'train': pass train_arg.*='inference'"),
        (lambda: from_nnx(NNXInference), "'inference' of NNXInference.__call__ true in training"),
        (
            lambda: from_nnx(NNXInference, train_argument="inference"),
            "Pass train_value=True or train_value=False",
        ),
        (lambda: from_nnx(NNXIsTrain, train_argument="training"), "has no argument 'training'"),
    ],
)
def test_the_sense_of_an_argument_is_asked(make, message):
    with pytest.raises(TypeError, match=message) as caught:
        make()
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_an_option_of_a_similar_name_is_no_mode():
    class Tested(nn.Module):
        def __call__(self, x, train=False, test="t-test"):
            return x

    class NNXTested(nnx.Module):
        def __call__(self, x, test="t-test"):
            return x

    for model in (from_linen(Tested()), from_nnx(lambda rngs: NNXTested())):
        model.apply({"params": {}, "batch_stats": {}}, jnp.ones((1, 2)), train=True)


@pytest.mark.parametrize(
    ("model", "attribute"),
    [
        (from_linen(TrainAttribute(), train_argument=None), "train"),
        (from_nnx(NNXTrainingAttribute), "training"),
    ],
)
def test_an_attribute_that_fixes_the_mode_is_refused_in_the_other_one(model, attribute):
    """As a teacher, which is only evaluated, the module is sound."""
    assert compute(model, train=False) == {"drops": False, "moves": False}
    assert compute(with_frozen_batch_stats(model)) == {"drops": False, "moves": False}
    with pytest.raises(ValueError, match=f"has {attribute}=False as an attribute, .* in training"):
        compute(model)


def test_an_attribute_that_fixes_training_is_refused_in_evaluation():
    model = from_linen(TrainAttribute(train=True), train_argument=None)
    with pytest.raises(ValueError, match="train=True as an attribute, which .* in evaluation too"):
        compute(model, train=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (from_linen(DropoutIsFixed()), "evaluated, its dropout drops nothing: let an argument"),
        (from_linen(StatisticsAreFixed()), "evaluated, its running statistics do not change: let"),
        (
            from_linen(ModeIsFixed(), train_argument=None),
            "ModeIsFixed .* statistics do not change and its dropout drops nothing",
        ),
        (from_nnx(NNXDropoutIsFixed), "its dropout drops nothing: let an argument"),
        (from_nnx(NNXModeIsFixed), "statistics do not change and its dropout drops nothing"),
    ],
)
def test_layers_that_do_not_follow_the_mode_are_named(model, message):
    with pytest.warns(UserWarning, match=message) as caught:
        compute(model)
    assert len(caught) == 1 and len(str(caught[0].message)) <= 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute(model, train=False)
        compute(with_frozen_batch_stats(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_linen(CNN), r"takes a module, but CNN is its class: pass CNN\(...\)"),
        (lambda: from_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "use models.from_nnx"),
        (lambda: from_linen(nnx.Linear), "Linear is an NNX module: use models.from_nnx"),
        (lambda: from_linen(from_linen(CNN())), "is a Model already: use it"),
        (lambda: from_linen(lambda x: x), r"a Linen module, got a function: .*Model\(init, apply"),
        (lambda: from_nnx(CNN()), "CNN is a Linen module: use models.from_linen"),
        (lambda: from_nnx(CNN), "CNN is a Linen module: use models.from_linen"),
        (lambda: from_nnx(lambda rngs: CNN()), "makes an NNX module, but it makes a CNN"),
        (lambda: from_nnx(from_linen(CNN())), "is a Model already: use it"),
        (lambda: from_nnx({"params": {}}), "got a dict: pass lambda rngs: Module"),
    ],
)
def test_modules_of_another_kind_are_refused_with_the_call_to_write(make, message):
    with pytest.raises(TypeError, match=message) as caught:
        make()
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


class NNXDropsAlways(NNXBody):
    def __call__(self, x):
        return self.dropout(self.norm(x), deterministic=False)


class NNXNormalizesAlways(NNXBody):
    def __call__(self, x):
        return self.dropout(self.norm(x, use_running_average=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NNXDropsAlways, "NNXDropsAlways draws random numbers in evaluation, .*leave that out"),
        (NNXNormalizesAlways, "NNXNormalizesAlways changes its running statistics in evaluation"),
    ],
)
def test_layers_that_train_in_evaluation_are_refused(make, message):
    """As of Linen modules. A value in the call wins over `eval()`."""
    model = from_nnx(lambda rngs: make(rngs))
    inputs = jnp.ones((5, 4))
    variables = model.init(jax.random.key(0), inputs)
    model.apply(variables, inputs, train=True, key=jax.random.key(1))
    for apply in (model.apply, jax.jit(model.apply, static_argnames="train")):
        with pytest.raises(ValueError, match=message):
            apply(variables, inputs, train=False)


class NNXKeywordRngs(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def test_a_class_that_takes_rngs_by_keyword_is_refused_with_the_call_to_write():
    with pytest.raises(TypeError, match=r"pass lambda rngs: NNXKeywordRngs\(..., rngs=rngs\)$"):
        from_nnx(NNXKeywordRngs)
    with pytest.raises(TypeError, match="with nnx.Rngs alone, which it does not take"):
        from_nnx(lambda: NNXKeywordRngs(rngs=nnx.Rngs(0)))
    from_nnx(lambda rngs: NNXKeywordRngs(rngs=rngs))


def test_a_jitted_layer_that_follows_eval_is_fine():
    """`nnx.jit` makes new objects of counters and statistics that stay as they are."""

    class Jitted(NNXBody):
        @nnx.jit
        def __call__(self, x):
            return self.dropout(self.norm(x))

    inputs = jnp.ones((5, 4))
    for model in (from_nnx(lambda rngs: Jitted(rngs)), from_nnx(Jitted(nnx.Rngs(0)))):
        variables = model.init(jax.random.key(0), inputs)
        for apply in (model.apply, jax.jit(model.apply, static_argnames="train")):
            apply(variables, inputs, train=False)
