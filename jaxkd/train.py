"""One training step: teachers outside the gradient, the student inside it."""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxkd.models.model import Model, synchronized
from jaxkd.views import Augment, augment_views

Batch = Mapping[str, Any]
"""What a step learns from: `inputs` [B, ...] and whatever the loss reads, such as `labels` [B]."""

Loss = Callable[..., Array]
"""`(student, teachers, batch) -> [B]`, one value per example, by functions of `jaxkd.losses`.

`student` is `Outputs`, `teachers` a tuple of them, `batch` a `Batch`. A loss with parameters of its own, such as a
projector, takes them as a fourth argument.
"""


class Purpose(enum.IntEnum):
    """What a random draw is for; folded into a stage's key, so that no two purposes share their bits."""

    INIT = 0
    ORDER = 1
    AUGMENT = 2
    MODEL = 3
    LOSS = 4
    VIEW = 5
    BUCKET = 6


class LossState(NamedTuple):
    """What a training step changes of a loss that has parameters of its own.

    Attributes:
        params: Its parameters.
        opt_state: Their optimizer's state.
    """

    params: Any
    opt_state: Any


class TrainState(NamedTuple):
    """Everything that a training step changes.

    Attributes:
        params: The student's parameters.
        batch_stats: Its running statistics, `{}` where it has none.
        opt_state: The optimizer's state.
        step: Steps taken so far, int32 scalar.
        loss: The state of the loss, if it has parameters of its own; the trained student goes without it.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    step: Array
    loss: LossState | None = None

    @property
    def variables(self) -> dict:
        """The student's variables, as `Model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_state(
    variables: dict,
    tx: optax.GradientTransformation,
    *,
    loss_params: Any = None,
    loss_tx: optax.GradientTransformation | None = None,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        variables: What `model.init` returned, or pretrained weights. Copied: a step donates its state, and donated
            buffers must not be anyone else's.
        tx: The optimizer.
        loss_params: Parameters of the loss, copied likewise. `None` for a loss without any.
        loss_tx: Their optimizer; by default `tx` with a state of its own, which then must not be bound to the student's
            tree, as one that freezes some of it is.

    Returns:
        The state at step 0.
    """
    variables, loss_params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (variables, loss_params))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    loss = None if loss_params is None else LossState(loss_params, (loss_tx or tx).init(loss_params))
    return TrainState(params, batch_stats, tx.init(params), jnp.zeros((), jnp.int32), loss)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    loss: Loss,
    *,
    teachers: Sequence[Model] = (),
    augment: Augment | None = None,
    views: int | None = None,
    loss_tx: optax.GradientTransformation | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Makes the compiled training step of a student.

    The teachers see the same augmented inputs as the student, run with their running statistics, and are evaluated
    before the gradient is taken: nothing of theirs is differentiated, updated or moved.

    Args:
        model: The student.
        tx: The optimizer.
        loss: `(student, teachers, batch) -> [B]`; the step minimises its mean. If the state holds parameters of the
            loss, it gets them as a fourth argument.
        teachers: The models of the teachers, in the order in which the loss gets their outputs.
        augment: `(key, inputs) -> inputs`, run inside the step.
        views: How many pictures `augment` makes of each example, which the epochs show in turn; `None`: a new one at
            every step. The batch then holds `index` [B], the examples' numbers, `examples`, how many there are, and
            `view_key`, which makes the draws; the loss also finds `view` [B] in it.
        loss_tx: The optimizer of the loss's own parameters; by default `tx`, as in `make_state`.
        axis_name: Of the mapped axis, for a step that runs under `jax.pmap` or `jax.shard_map`. All its devices get the
            whole batch and augment it; each runs the networks on its part, and the loss sees the outputs of all. The
            result is that of one device, but for what the student draws, such as dropout. Batch norm must know the
            axis, as `jaxkd.models.BatchNorm` does.

    Returns:
        `step(state, batch, teacher_variables, key) -> (state, metrics)`. `teacher_variables` is a tuple, one for each
        teacher. `key` is the whole training's: each step folds its own number in, so that a restarted training draws
        what an unbroken one draws. `metrics` holds `loss`, the mean over the batch. The state is donated: use the
        one returned.

    Raises:
        ValueError: At the first call, if the loss does not return one value per example or the number of
            `teacher_variables` is not that of the teachers.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxkd import losses, models, train
        >>> model = models.from_linen(models.CNN(features=(8,), hidden=8))
        >>> batch = {"inputs": jnp.ones((4, 8, 8, 1)), "labels": jnp.arange(4)}
        >>> variables = model.init(jax.random.key(0), batch["inputs"])
        >>> tx = optax.sgd(0.1)
        >>> step = train.make_train_step(
        ...     model, tx, lambda student, _, batch: losses.hard_cross_entropy(student.logits, batch["labels"])
        ... )
        >>> state, metrics = step(train.make_state(variables, tx), batch, (), jax.random.key(1))
        >>> int(state.step), metrics["loss"].shape
        (1, ())
    """
    teachers = tuple(teachers)

    def step(
        state: TrainState, batch: Batch, teacher_variables: tuple[dict, ...], key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        if len(teacher_variables) != len(teachers):
            raise ValueError(f"{len(teachers)} teachers, but variables for {len(teacher_variables)}")
        if views is not None:
            batch = {**batch, "view": _views(batch, state.step, views)}
        inputs = batch["inputs"]
        if augment is not None and views is not None:
            inputs = augment_views(augment, batch["view_key"], inputs, batch["index"], batch["view"])
        elif augment is not None:
            inputs = augment(_draw(key, Purpose.AUGMENT, state.step), inputs)
        mine = _part(inputs, axis_name)
        taught = tuple(
            _gather(teacher.apply(variables, mine, train=False)[0], axis_name)
            for teacher, variables in zip(teachers, teacher_variables, strict=True)
        )

        def mean_loss(params: Any, *loss_params: Any) -> tuple[Array, dict]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            draw = _each_its_own(_draw(key, Purpose.MODEL, state.step), axis_name)
            with synchronized(axis_name):
                student, batch_stats = model.apply(variables, mine, train=True, key=draw)
            values = loss(_gather(student, axis_name), taught, batch, *loss_params)
            if values.shape != inputs.shape[:1]:
                raise ValueError(f"the loss must return one value per example {inputs.shape[:1]}, got {values.shape}")
            return _part(values, axis_name).sum() / len(values), batch_stats

        trained = (state.params,) if state.loss is None else (state.params, state.loss.params)
        gradient = jax.value_and_grad(mean_loss, argnums=tuple(range(len(trained))), has_aux=True)
        (value, batch_stats), gradients = gradient(*trained)
        if axis_name is not None:
            value, gradients = lax.psum((value, gradients), axis_name)
        params, opt_state = _descend(tx, gradients[0], state.opt_state, state.params)
        own = None
        if state.loss is not None:
            own = LossState(*_descend(loss_tx or tx, gradients[1], state.loss.opt_state, state.loss.params))
        return TrainState(params, batch_stats, opt_state, state.step + 1, own), {"loss": value}

    return jax.jit(step, donate_argnums=0)


def _views(batch: Batch, step: Array, count: int) -> Array:
    """The view of each example: that of the epoch to which its place in this batch belongs."""
    places = step * len(batch["index"]) + jnp.arange(len(batch["index"]), dtype=jnp.int32)
    return places // batch["examples"] % count


def _descend(tx: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _part(array: Array, axis_name: str | None) -> Array:
    """This device's part of a batch that all have whole."""
    if axis_name is None:
        return array
    size = len(array) // lax.psum(1, axis_name)
    return lax.dynamic_slice_in_dim(array, lax.axis_index(axis_name) * size, size)


def _gather(tree: Any, axis_name: str | None) -> Any:
    """The whole batch, of which all have a part."""
    return tree if axis_name is None else lax.all_gather(tree, axis_name, tiled=True)


def _each_its_own(key: Array, axis_name: str | None) -> Array:
    return key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))


def _draw(key: Array, purpose: Purpose, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), step)
