"""A model is a pair of pure functions, so that Flax Linen, Flax NNX or anything else can stand behind it."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:
    from flax import linen, nnx


class Outputs(NamedTuple):
    """What a model says about a batch.

    Attributes:
        logits: `[..., num_classes]`.
        features: Named intermediate states, such as `stage1` and `pre_logits`.
    """

    logits: Array
    features: dict[str, Array]


class Model(NamedTuple):
    """A pair of pure functions over variables `{"params": ..., "batch_stats": ...}`, plain nested dicts.

    Attributes:
        init: `(key, inputs) -> variables`.
        apply: `(variables, inputs, *, train, key=None) -> (Outputs, batch_stats)`. Statistics move in training only;
            without any, `batch_stats` is `{}`. `key` feeds dropout and its like.
    """

    init: Callable[..., dict]
    apply: Callable[..., tuple[Outputs, dict]]


def from_linen(module: "linen.Module", *, train_argument: str | None = "train") -> Model:
    """Makes a model from a Flax Linen module.

    The module returns `Outputs`, or logits alone, beside which values that it sows into `"intermediates"` become the
    features, named by their path.

    Args:
        module: The module.
        train_argument: Name of the boolean argument of the module's `__call__` that is true in training; `None` for
            a module that behaves alike in both modes.

    Returns:
        The pair of functions.

    Raises:
        TypeError: If the module's `__call__` has no argument of that name.
        ValueError: From `init`, if the module keeps other variables than parameters and running statistics.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(16,), hidden=32))
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> outputs.logits.shape, sorted(outputs.features)
        ((2, 10), ['pre_logits', 'stage1'])
    """
    if train_argument is not None and train_argument not in inspect.signature(type(module).__call__).parameters:
        raise TypeError(
            f"{type(module).__name__}.__call__ has no argument {train_argument!r}: name the one that is true in "
            "training by train_argument=..., or pass train_argument=None if there is none"
        )

    def mode(train: bool) -> dict[str, Any]:
        return {} if train_argument is None else {train_argument: train}

    def init(key: Array, inputs: Array) -> dict:
        keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables: Any = module.init(keys, inputs, **mode(False))
        if others := sorted(set(variables) - {"params", "batch_stats", "intermediates"}):
            raise ValueError(
                f"{type(module).__name__} keeps {', '.join(others)}, for which a model has no place: it has params, "
                "and batch_stats that move in training"
            )
        return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}

    def apply(variables: dict, inputs: Array, *, train: bool, key: Array | None = None) -> tuple[Outputs, dict]:
        mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
        rngs = None if key is None else {"dropout": key}
        answer: Any = module.apply(variables, inputs, **mode(train), mutable=mutable, rngs=rngs)
        result, moved = answer
        if not isinstance(result, Outputs):
            result = Outputs(result, _sown(moved.get("intermediates", {})))
        return result, moved.get("batch_stats", variables.get("batch_stats", {}))

    return Model(init, apply)


def _sown(intermediates: dict) -> dict[str, Array]:
    """Names sown values by their path, and those of a place that was passed several times by a number too."""
    leaves = jax.tree_util.tree_leaves_with_path(intermediates, is_leaf=lambda node: isinstance(node, tuple))
    features = {}
    for path, values in leaves:
        name = "/".join(str(entry.key) for entry in path)
        features |= {name: values[0]} if len(values) == 1 else {f"{name}/{i}": one for i, one in enumerate(values)}
    return features


def from_nnx(module: "nnx.Module | Callable[[nnx.Rngs], nnx.Module]") -> Model:
    """Makes a model from a Flax NNX module.

    Args:
        module: A constructor that takes `nnx.Rngs`, as a class of one argument does, or a module; the weights that a
            module holds are then what `init` returns for every key. Calling it gives `Outputs`, or logits alone.
            Training mode is set by `module.train()` and `module.eval()`.

    Returns:
        The pair of functions. The module is merged anew, from copies, at each call and never changed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 4)))
        >>> outputs, batch_stats = model.apply(variables, jnp.zeros((2, 4)), train=False)
        >>> outputs.logits.shape, batch_stats
        ((2, 3), {})
    """
    from flax import nnx

    def build(key: Array) -> Any:
        return module if isinstance(module, nnx.Module) else module(nnx.Rngs(key))

    graphdef, *states, others = nnx.split(build(jax.random.key(0)), nnx.Param, nnx.BatchStat, ...)

    def init(key: Array, inputs: Array) -> dict:
        del inputs
        _, *fresh, _ = nnx.split(build(key), nnx.Param, nnx.BatchStat, ...)
        params, batch_stats = (jax.tree.map(jnp.array, nnx.to_pure_dict(state)) for state in fresh)
        return {"params": params, "batch_stats": batch_stats}

    def apply(variables: dict, inputs: Array, *, train: bool, key: Array | None = None) -> tuple[Outputs, dict]:
        params, batch_stats = (jax.tree.map(lambda leaf: leaf, state) for state in states)
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(batch_stats, variables["batch_stats"])
        merged = nnx.merge(graphdef, params, batch_stats, others, copy=True)
        merged.train() if train else merged.eval()
        if key is not None:
            nnx.reseed(merged, default=key, dropout=key)
        result = merged(inputs)
        outputs = result if isinstance(result, Outputs) else Outputs(result, {})
        return outputs, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    return Model(init, apply)


def standardized(model: Model, mean: ArrayLike, std: ArrayLike) -> Model:
    """Puts a model behind its input's normalisation, so that it takes uint8 images as they are stored.

    `x -> (x / 255 - mean) / std`, in float32. Teacher and student may each have their own.

    Args:
        model: A model of floating-point images `[B, H, W, C]`.
        mean: Mean of each channel, `[C]`, in units of full brightness.
        std: Standard deviation of each channel, `[C]`, likewise.

    Returns:
        The model of uint8 images.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def prepare(inputs: Array) -> Array:
        channels = (1,) * (inputs.ndim - 1) + (-1,)
        return (inputs.astype(jnp.float32) / 255 - mean.reshape(channels)) / std.reshape(channels)

    def apply(variables: dict, inputs: Array, *, train: bool, key: Array | None = None) -> tuple[Outputs, dict]:
        return model.apply(variables, prepare(inputs), train=train, key=key)

    return Model(lambda key, inputs: model.init(key, prepare(inputs)), apply)


@contextlib.contextmanager
def synchronized(axis_name: str | None) -> Generator[None]:
    """Lets the `BatchNorm` of this package, while a model is traced, take the statistics of all devices' batches.

    Args:
        axis_name: Of the mapped axis over whose devices the batch is divided; `None`: of this device's batch.
    """
    token = _MAPPED_AXIS.set(axis_name)
    try:
        yield
    finally:
        _MAPPED_AXIS.reset(token)


def mapped_axis() -> str | None:
    """The axis over which statistics are to be taken, as `synchronized` set it."""
    return _MAPPED_AXIS.get()


_MAPPED_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("mapped_axis", default=None)


def computing_in(model: Model, dtype: DTypeLike) -> Model:
    """Lets a model compute in another precision, such as bfloat16, with its weights and logits in float32.

    Weights and inputs are rounded on the way in, so that gradients and optimizer stay in float32. Running statistics
    are not rounded. Put `standardized` around it, whose arithmetic on pixels then is in float32.

    Args:
        model: A model whose layers take the precision of what they get, as Flax's do by default.
        dtype: A floating-point dtype.

    Returns:
        The model, with the same variables.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = computing_in(from_linen(CNN(features=(4,), hidden=8)), jnp.bfloat16)
        >>> images = jnp.zeros((2, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> variables["params"]["conv1"]["kernel"].dtype, outputs.features["stage1"].dtype, outputs.logits.dtype
        (dtype('float32'), dtype(bfloat16), dtype('float32'))
    """

    def rounded(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def apply(variables: dict, inputs: Array, *, train: bool, key: Array | None = None) -> tuple[Outputs, dict]:
        rough = {**variables, "params": rounded(variables["params"])}
        outputs, batch_stats = model.apply(rough, rounded(inputs), train=train, key=key)
        return outputs._replace(logits=outputs.logits.astype(jnp.float32)), batch_stats

    return Model(model.init, apply)


def frozen_statistics(model: Model) -> Model:
    """Lets a model use and keep its running statistics in training too, as for fine-tuning on small batches.

    Training then runs it as inference does: besides batch norm that concerns all else that depends on the mode, so that
    dropout and its like are off. Scales and biases of batch norm are parameters, and are trained unless frozen.

    Args:
        model: Any model.

    Returns:
        The model that behaves alike in both modes, with the same variables.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxkd.models.model import from_nnx, frozen_statistics
        >>> model = frozen_statistics(from_nnx(lambda rngs: nnx.BatchNorm(2, rngs=rngs)))
        >>> images = jnp.array([[3.0, 4.0]])
        >>> _, batch_stats = model.apply(model.init(jax.random.key(0), images), images, train=True)
        >>> batch_stats["mean"]
        Array([0., 0.], dtype=float32)
    """

    def apply(variables: dict, inputs: Array, *, train: bool, key: Array | None = None) -> tuple[Outputs, dict]:
        del train
        return model.apply(variables, inputs, train=False, key=key)

    return Model(model.init, apply)
