"""The training step: teachers outside the gradient, the student inside it."""

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxkd._messages import describe_lacking_params, list_some, shorten
from jaxkd.data.mixing import Mix, Mixed
from jaxkd.data.views import Augment, augment_views
from jaxkd.distill._cached_outputs import get_batch_outputs
from jaxkd.distill._rewrite import RewriteFn, rewrite_batch
from jaxkd.distill.selection import as_weights, start_average, update_average
from jaxkd.models.model import Model, Outputs, cross_replica_batch_stats

StepFn = Callable[..., tuple["TrainState", dict[str, Array]]]
"""`(state, batch, teacher_variables, key, info) -> (state, metrics)`, see `make_train_step`."""

Batch = Mapping[str, Any]
"""The user's arrays of a step: `inputs` [B, ...], an array or a dict of arrays, and what the loss
reads, such as `labels` [B]."""

LossFn = Callable[..., Any]
"""`(student, teachers, batch, context) -> [B]`, one value per example.

`student` is an `Outputs`, `teachers` a tuple of them, `batch` a `Batch`, `context` a `LossContext`.
The loss may also return `(values [B], {"kd": [B], "ce": [B], ...})`: only the values are minimised,
and the mean of each named term is recorded.
"""


class Purpose(enum.IntEnum):
    """The purpose of a random draw, folded into the key so that no two purposes share bits."""

    INIT = 0
    ORDER = 1
    AUGMENT = 2
    MODEL = 3
    LOSS_INIT = 4
    VIEW = 5
    BUCKET = 6
    LOSS = 7
    REWRITE = 8


class LossContext(NamedTuple):
    """What a loss may depend on besides the outputs and the user's batch.

    Attributes:
        step: Number of steps taken so far, int32 scalar.
        progress: `step` as a fraction of all steps, float32 scalar in [0, 1); `None` if
            `make_train_step` was not given `num_steps`. A temperature or a weight may follow it.
        key: PRNG key for the loss's own draws in this step.
        params: The loss's own parameters, `None` if it has none.
        view: `[B]`, int32, the view of each example; `None` unless views are fixed.
        mix: What each example was mixed with, `data.Mix`; `None` unless `augment` mixes them. A
            loss that reads labels must mix them too, for example with `data.mix_labels`.
    """

    step: Array
    progress: Array | None
    key: Array
    params: Any
    view: Array | None
    mix: Mix | None = None


class BatchInfo(NamedTuple):
    """What the library knows about a batch. It is kept apart from the user's arrays.

    Attributes:
        index: `[B]`, int32, the index of each example in the data set. Needed for views.
        num_examples: Number of examples in the data set, int32 scalar. Needed for views.
        view_key: The PRNG key that draws the views.
        teacher_logits: Cached logits of each teacher, `[B, ..., C]` or their `TopK`. With V views
            they are `[B, V, ..., C]`. `None` for a teacher of which features alone are cached.
        teacher_features: Cached features of each teacher by name, `[B, ...]` or `[B, V, ...]`. Like
            the logits, they may be in 16 bits, and reach the loss in float32.
    """

    index: Any = None
    num_examples: Any = None
    view_key: Any = None
    teacher_logits: tuple = ()
    teacher_features: tuple = ()


class LossState(NamedTuple):
    """The state of a loss that has parameters of its own.

    Attributes:
        params: The parameters.
        opt_state: The state of their optimizer.
    """

    params: Any
    opt_state: Any


class TrainState(NamedTuple):
    """Everything that a training step changes.

    Attributes:
        params: The student's parameters.
        batch_stats: Its running statistics, `{}` if it has none.
        opt_state: The optimizer's state.
        step: Number of steps taken so far, int32 scalar.
        loss: The state of the loss, if it has parameters of its own. It is not part of the trained
            student.
        average: The exponential moving average of `params` and `batch_stats`, if one is kept.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    step: Array
    loss: LossState | None = None
    average: Any = None

    @property
    def variables(self) -> dict:
        """The student's variables, as `Model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def average_variables(self) -> dict:
        """The average in the dtypes of the variables; the variables themselves without one."""
        return self.variables if self.average is None else as_weights(self.average, self.variables)


def init_train_state(
    variables: dict,
    tx: optax.GradientTransformation,
    *,
    loss_params: Any = None,
    loss_tx: optax.GradientTransformation | None = None,
    has_average: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        variables: The result of `model.init`, or pretrained weights. They are copied, because a
            step donates its state and donated buffers must have no other owner.
        tx: The optimizer.
        loss_params: Parameters of the loss, copied as well. `None` for a loss without any.
        loss_tx: Their optimizer. By default `tx`, with a state of its own. Pass another one if `tx`
            depends on the student's tree, as an optimizer that freezes some weights does.
        has_average: Whether the state has an average of the weights, for a step with an
            `ema_decay`.

    Returns:
        The state at step 0.

    Raises:
        ValueError: If the variables lack the level `params`.
    """
    if problem := describe_lacking_params(variables):
        raise ValueError(problem)
    variables, loss_params = jax.tree.map(
        lambda leaf: jnp.array(leaf, copy=True), (variables, loss_params)
    )
    params = variables["params"]
    loss = None
    if loss_params is not None:
        loss = LossState(loss_params, (loss_tx or tx).init(loss_params))
    step = jnp.zeros((), jnp.int32)
    average = start_average(variables) if has_average else None
    batch_stats = variables.get("batch_stats", {})
    return TrainState(params, batch_stats, tx.init(params), step, loss, average)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    loss: LossFn,
    *,
    teachers: Sequence[Model] = (),
    rewrite: RewriteFn | None = None,
    augment: Augment | None = None,
    views: int | None = None,
    loss_tx: optax.GradientTransformation | None = None,
    num_steps: int | None = None,
    cached_num_classes: Sequence[int] | None = None,
    ema_decay: float | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Makes the compiled training step of a student.

    The teachers see the same augmented inputs as the student and use their running statistics. They
    are evaluated outside the gradient: nothing of theirs is differentiated, updated or moved.

    Args:
        model: The student.
        tx: The optimizer.
        loss: `(student, teachers, batch, context) -> [B]`, or these values and a dict of terms to
            record, see `LossFn`. The step minimises the mean of the values.
        teachers: The models of the teachers, in the order in which the loss gets their outputs.
        rewrite: `(variables, batch, key) -> batch`, run at the beginning of the step with the
            student's variables before it, outside of the gradient. Student, teachers and loss get
            what it returns, arrays of the same names, shapes and dtypes. On-policy distillation
            samples with `decode.sample` there.
        augment: `(key, inputs) -> inputs`, run inside the step. `data.mixup` and `data.cutmix` mix
            the examples of the batch, and tell the loss so by `LossContext.mix`.
        views: Number of augmented views of each example, which the epochs show in turn. `None`
            draws a new view at every step. With views, the step needs `index`, `num_examples` and
            `view_key` of a `BatchInfo`.
        loss_tx: The optimizer of the loss's own parameters. By default `tx`, as in
            `init_train_state`.
        num_steps: Number of steps of the whole training, for `LossContext.progress`.
        cached_num_classes: Number of classes of each teacher whose logits are cached as `TopK`. By
            default that of the student.
        ema_decay: Largest weight of the old average when a step updates the exponential moving
            average of the student's weights, in (0, 1). The state needs an average
            (`init_train_state(has_average=True)`). `None` keeps none.
        axis_name: Name of the mapped axis if the step runs under `jax.pmap` or `jax.shard_map`.
            Every device gets the whole batch, rewrites and augments it, runs the networks on its
            share, and the loss gets the outputs of all devices. The result is that of one device,
            except for the student's own draws, such as dropout. Batch norm must know the axis, as
            `jaxkd.models.BatchNorm` does.

    Returns:
        `step(state, batch, teacher_variables, key, info=BatchInfo()) -> (state, metrics)`.
        `teacher_variables` has one entry per teacher; `None` lets the student's average teach,
        as it was before the step. `key` is the key of the whole training: each
        step folds its number in, so a resumed training draws the same bits. `metrics` holds `loss`,
        the mean over the batch, and that of each term. The old state is donated and must not be
        used afterwards.

    Raises:
        ValueError: If there are both `rewrite` and `views`. When first called, if the loss or a
            term does not have one value per example, the number of `teacher_variables` is not the
            number of teachers, or what `rewrite` returns has other names, shapes or dtypes.
        TypeError: If `teachers` is a single model. When first called, if the batch is no dict, the
            loss does not return a floating-point array, or its terms are no dict of arrays.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxkd import distill, losses, models
        >>> model = models.from_linen(models.CNN(features=(8,), hidden=8))
        >>> batch = {"inputs": jnp.ones((4, 8, 8, 1)), "labels": jnp.arange(4)}
        >>> variables = model.init(jax.random.key(0), batch["inputs"])
        >>> tx = optax.sgd(0.1)
        >>> def loss(student, teachers, batch, context):
        ...     return losses.hard_cross_entropy(student.logits, batch["labels"])
        >>> step = distill.make_train_step(model, tx, loss)
        >>> state = distill.init_train_state(variables, tx)
        >>> state, metrics = step(state, batch, (), jax.random.key(1))
        >>> int(state.step), metrics["loss"].shape
        (1, ())
    """
    # A model is itself a sequence, of two functions.
    if isinstance(teachers, Model):
        raise TypeError("teachers must be a sequence of models, got one: write [teacher]")
    teachers = tuple(teachers)
    if rewrite is not None and views is not None:
        raise ValueError("a batch that rewrite makes has no fixed views: leave out views")

    def step(
        state: TrainState,
        batch: Batch,
        teacher_variables: tuple[dict, ...],
        key: Array,
        info: BatchInfo = BatchInfo(),  # noqa: B008  (a NamedTuple is immutable)
    ) -> tuple[TrainState, dict[str, Array]]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batch must be a dict {'inputs': ..., ...} that the loss reads by name, got a "
                f"{type(batch).__name__}"
            )
        if len(teacher_variables) != len(teachers):
            raise ValueError(
                f"{len(teachers)} teachers, but variables for {len(teacher_variables)}: "
                "pass one entry each"
            )
        if (ema_decay is None) != (state.average is None):
            raise ValueError(
                "a step with an ema_decay needs init_train_state(has_average=True), and one "
                f"without needs none: got ema_decay={ema_decay}"
            )
        if rewrite is not None:
            rewrite_key = _fold_in(key, Purpose.REWRITE, state.step)
            batch = rewrite_batch(rewrite, state.variables, batch, rewrite_key)
        view = None if views is None else _get_view(info, state.step, views)
        inputs = batch["inputs"]
        if augment is not None and view is not None:
            inputs = augment_views(augment, info.view_key, inputs, info.index, view)
        elif augment is not None:
            inputs = augment(_fold_in(key, Purpose.AUGMENT, state.step), inputs)
        mix = None
        if isinstance(inputs, Mixed):
            inputs, mix = inputs
        # Augmented before it is divided, so that every number of devices draws the same views.
        share = jax.tree.map(lambda array: _take_share(array, axis_name), inputs)
        # Outside of `mean_loss`, so the teachers are constants for the gradient and their
        # activations are not kept for it.
        live_outputs = tuple(
            _gather(
                teacher.apply(
                    state.average_variables if variables is None else variables, share, train=False
                )[0],
                axis_name,
            )
            for teacher, variables in zip(teachers, teacher_variables, strict=True)
        )
        progress = None
        if num_steps is not None:
            progress = state.step.astype(jnp.float32) / num_steps
        context = LossContext(
            state.step, progress, _fold_in(key, Purpose.LOSS, state.step), None, view, mix
        )

        def mean_loss(params: Any, *loss_params: Any) -> tuple[Array, tuple[dict, dict]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            model_key = _fold_in(key, Purpose.MODEL, state.step)
            with cross_replica_batch_stats(axis_name):
                student, batch_stats = model.apply(
                    variables, share, train=True, key=_for_device(model_key, axis_name)
                )
            # The loss sees the outputs of all devices, since it may compare examples.
            student = _gather(student, axis_name)
            # Inside of `mean_loss`, because without `cached_num_classes` only the student's logits
            # tell the number of classes to which the largest logits are expanded.
            cached = info.teacher_logits, info.teacher_features
            counts = cached_num_classes or [student.logits.shape[-1]] * len(cached[0] or cached[1])
            outputs = live_outputs + get_batch_outputs(*cached, view, counts)
            own_params = loss_params[0] if loss_params else None
            values, terms = split_terms(
                _call_loss(loss, student, outputs, batch, context._replace(params=own_params)),
                jax.tree.leaves(inputs)[0].shape[:1],
            )

            # Each device has the values of all examples. It differentiates its own share, so that
            # the sum over devices counts none twice.
            def mean(values: Array) -> Array:
                return _take_share(values, axis_name).sum() / len(values)

            return mean(values), (batch_stats, {name: mean(term) for name, term in terms.items()})

        trained = (state.params,) if state.loss is None else (state.params, state.loss.params)
        value_and_grad = jax.value_and_grad(
            mean_loss, argnums=tuple(range(len(trained))), has_aux=True
        )
        (value, (batch_stats, terms)), gradients = value_and_grad(*trained)
        if axis_name is not None:
            # Each device has the sum over its share, divided by the size of the whole batch.
            value, terms, gradients = lax.psum((value, terms, gradients), axis_name)
        params, opt_state = _update(tx, gradients[0], state.opt_state, state.params)
        loss_state = None
        if state.loss is not None:
            loss_state = LossState(
                *_update(loss_tx or tx, gradients[1], state.loss.opt_state, state.loss.params)
            )
        average = None
        if ema_decay is not None:
            variables = {"params": params, "batch_stats": batch_stats}
            average = update_average(state.average, variables, state.step, ema_decay)
        state = TrainState(params, batch_stats, opt_state, state.step + 1, loss_state, average)
        return state, {"loss": value} | terms

    # With a donated state, old and new state need not be in memory at the same time.
    return jax.jit(step, donate_argnums=0)


def _call_loss(loss: LossFn, student: Any, teachers: Any, batch: Batch, context: Any) -> Any:
    """Calls a loss. Errors on what the batch, a teacher or the context lacks name what there is."""
    try:
        return loss(student, teachers, batch, context)
    except (AttributeError, TypeError, ValueError) as error:
        lacks_logits = any(teacher.logits is None for teacher in teachers)
        if lacks_logits and re.search("NoneType|teacher_logits", str(error)):
            raise TypeError(
                "the loss reads the logits of a teacher of which features alone are cached "
                f"({shorten(error, 80)}): set cache_logits=True, or read its features"
            ) from error
        absent = [name for name, source in _SOURCES.items() if getattr(context, name) is None]
        if isinstance(error, TypeError) and "NoneType" in str(error) and absent:
            raise TypeError(
                f"the loss computes with None ({shorten(error, 80)}): context."
                + ", context.".join(f"{name} needs {_SOURCES[name]}" for name in absent)
            ) from error
        raise
    except KeyError as error:
        if len(error.args) == 1 and isinstance(error.args[0], str) and error.args[0] not in batch:
            raise KeyError(
                f"the loss reads {error.args[0]!r:.60}, but its batch holds {list_some(batch)}"
                + _describe_features(student, teachers)
            ) from error
        raise
    except IndexError as error:
        if str(error) == "tuple index out of range":
            raise IndexError(
                f"the loss reads further teachers than the {len(teachers)} of its stage, or an "
                "axis that an array lacks: name them in teachers=(...)"
            ) from error
        raise


_SOURCES = {"params": "an init_loss", "view": "views", "progress": "num_steps"}
"""What fills the fields of a `LossContext` that may be `None`."""


def _describe_features(student: Outputs, teachers: Sequence[Outputs]) -> str:
    """Describes the features of the outputs that a loss gets."""
    owners = {"the student": student} | {
        f"teacher {number}": outputs for number, outputs in enumerate(teachers)
    }
    return "".join(
        f"; the features of {owner} are {list_some(sorted(outputs.features)) or 'none'}"
        for owner, outputs in [*owners.items()][:3]
    )


def split_terms(
    result: Any, batch_shape: tuple[int, ...], owner: str = "the loss"
) -> tuple[Array, dict[str, Array]]:
    """Returns what a loss returned as its values and its terms, after a check of both.

    `owner` is for messages.
    """
    values, terms = result, {}
    if isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            raise TypeError(
                f"{owner} must return values [B], or (values, {{'kd': [B], ...}}), got a tuple of "
                f"{list_some([type(item).__name__ for item in result]) or 'nothing'}"
            )
        values, terms = result
    _check_loss_values(values, batch_shape, owner)
    for name, term in terms.items():
        if not isinstance(name, str) or not name or name == "loss":
            raise ValueError(
                f"a term of {owner} must have a name other than 'loss', got {name!r:.60}"
            )
        _check_loss_values(term, batch_shape, f"the term {name!r:.60} of {owner}")
    return values, dict(terms)


def _check_loss_values(values: Any, batch_shape: tuple[int, ...], owner: str) -> None:
    """Raises an error unless there is one floating-point value per example."""
    if not hasattr(values, "shape"):
        raise TypeError(
            f"{owner} must be an array {batch_shape}, got a {type(values).__name__}: "
            "is a return missing?"
        )
    if values.shape != batch_shape:
        raise ValueError(
            f"{owner} must have one value per example {batch_shape}, got the shape {values.shape}"
        )
    # Its gradient would be 0, and the student would not learn.
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{owner} must have floating-point values, got {values.dtype}")


def _get_view(info: BatchInfo, step: Array, count: int) -> Array:
    """Returns the view of each example. A batch that spans two epochs has two views."""
    batch_size = len(info.index)
    # Positions count as in `make_order`: epochs follow one another without a gap.
    positions = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    return positions // info.num_examples % count


def _update(
    tx: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _take_share(array: Array, axis_name: str | None) -> Array:
    """Returns this device's share of a batch that every device holds whole."""
    if axis_name is None:
        return array
    # The sum of a Python number is the number of devices, which is known at trace time. The size of
    # a slice must be static.
    size = len(array) // lax.psum(1, axis_name)
    return lax.dynamic_slice_in_dim(array, lax.axis_index(axis_name) * size, size)


def _gather(tree: Any, axis_name: str | None) -> Any:
    """Joins the shares of all devices."""
    return tree if axis_name is None else lax.all_gather(tree, axis_name, tiled=True)


def _for_device(key: Array, axis_name: str | None) -> Array:
    """Returns a key of this device's own, so that devices draw different dropout masks."""
    return key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))


def _fold_in(key: Array, purpose: Purpose, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), step)
