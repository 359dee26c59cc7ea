"""Schemes of distillation as plans: born-again generations, and students that teach each other."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxkd._messages import list_some, shorten
from jaxkd.distill._lowering import find_used_inputs
from jaxkd.distill.plan import Derived, Entry, Stage
from jaxkd.distill.step import Batch, LossContext, LossFn, split_terms
from jaxkd.models import joint
from jaxkd.models.model import Outputs

SHARED = ("data", "steps", "batch_size", "augment", "views", "ema_decay", "best", "key_name")
"""Attributes that are equal for all students that teach each other: they train in one step."""


def ensemble(name: str, stages: Sequence[Stage]) -> Derived:
    """Makes the ensemble of finished stages, whose probabilities are the mean of theirs.

    Args:
        name: Name of the ensemble in the plan. It may teach.
        stages: The stages, at least one.

    Returns:
        An entry of the plan.
    """
    names = [stage.name for stage in stages]
    return Derived(
        name,
        joint.join({stage.name: stage.model for stage in stages}),
        tuple(names),
        lambda *variables: joint.join_variables(dict(zip(names, variables, strict=True))),
    )


def born_again(first: Stage, loss: LossFn, *, generations: int) -> list[Entry]:
    """Makes generations of one network, each of which learns from the one before, and an ensemble.

    Args:
        first: The first generation, which has its own loss, such as one on labels.
        loss: The loss of the later ones, whose only teacher is the generation before.
        generations: Number of generations, at least 2.

    Returns:
        The stages `NAME`, `NAME_2`, `NAME_3`, ... and the ensemble of all, `NAME_ensemble`.

    Raises:
        TypeError: If `first` is no stage, or the number of generations no integer.
        ValueError: If there are fewer than two generations.

    References:
        Furlanello et al., Born-Again Neural Networks, https://arxiv.org/abs/1805.04770
    """
    if not isinstance(first, Stage):
        raise TypeError(f"the first generation must be a Stage, got a {type(first).__name__}")
    if not isinstance(generations, (int, np.integer)):
        raise TypeError(f"generations must be an integer, got {shorten(repr(generations), 40)}")
    if generations < 2:
        raise ValueError(f"generations must be at least 2, got {generations}")
    stages = [first]
    for number in range(2, generations + 1):
        stages.append(
            dataclasses.replace(
                first, name=f"{first.name}_{number}", loss=loss, teachers=(stages[-1].name,)
            )
        )
    return [*stages, ensemble(f"{first.name}_ensemble", stages)]


def mutual_learning(peers: Sequence[Stage], *, name: str = "peers") -> list[Entry]:
    """Makes a plan in which students learn from each other, all of them in one step.

    The loss of each gets the outputs of the others as its teachers, in their order, as they are in
    this step. No gradient flows into a teacher.

    Args:
        peers: At least two stages without teachers and start. They may have different networks,
            optimizers and losses, but have the same data, steps, batch size, augmentation, average
            and choice of the best.
        name: Name of the joint training, whose model is the ensemble of all. Its evaluations are
            those of the ensemble.

    Returns:
        The joint stage, and each student under its own name. `metrics.jsonl` has the loss of each
        as a term.

    Raises:
        TypeError: If a peer is no stage.
        ValueError: If there are fewer than two peers, names are repeated, a peer has teachers, a
            start or cached teachers, or peers differ in what they have to share.

    References:
        Zhang et al., Deep Mutual Learning, https://arxiv.org/abs/1706.00384
    """
    peers = [peers] if isinstance(peers, Stage) else list(peers)
    _check_peers(peers)
    names = [peer.name for peer in peers]
    has_warned: list[bool] = []  # The loss is traced more than once.

    def loss(
        student: Outputs, teachers: Sequence[Outputs], batch: Batch, context: LossContext
    ) -> tuple[Array, dict[str, Array]]:
        outputs = {name: joint.take_member_outputs(student, name) for name in names}
        constant = jax.lax.stop_gradient(outputs)
        values, arguments = {}, {}
        for number, peer in enumerate(peers):
            others = tuple(constant[name] for name in names if name != peer.name)
            params = None if peer.init_loss is None else context.params[peer.name]
            own_context = context._replace(
                key=jax.random.fold_in(context.key, number), params=params
            )
            arguments[peer.name] = outputs[peer.name], others, batch, own_context
            values[peer.name] = _call_peer_loss(peer, *arguments[peer.name])
        if not has_warned and not any(_reads_peers(peer, *arguments[peer.name]) for peer in peers):
            has_warned.append(True)
            warnings.warn(
                f"no loss of the peers {list_some(names)} depends on another peer, so that they "
                "train apart: read teachers in a loss",
                stacklevel=2,
            )
        # Each term has the gradient of its own student alone.
        return jnp.sum(jnp.stack([*values.values()]), axis=0), values

    shared = {attribute: getattr(peers[0], attribute) for attribute in SHARED}
    joint_stage = Stage(
        name,
        joint.join({peer.name: peer.model for peer in peers}),
        loss=loss,
        tx=_partition({peer.name: peer.tx for peer in peers}),
        init_loss=_join_init_losses(peers),
        loss_tx=_join_loss_optimizers(peers),
        **shared,
    )
    students = [Derived(peer.name, peer.model, (name,), _make_taker(peer.name)) for peer in peers]
    return [joint_stage, *students]


def _call_peer_loss(
    peer: Stage,
    student: Outputs,
    teachers: Sequence[Outputs],
    batch: Batch,
    context: LossContext,
) -> Array:
    """Returns the values of a peer's loss. Errors name the peer."""
    owner = f"the loss of the peer {shorten(peer.name, 40)!r}"
    try:
        result = peer.loss(student, tuple(teachers), batch, context)
    except IndexError as error:
        if str(error) != "tuple index out of range":
            raise
        raise IndexError(
            f"{owner} reads further teachers than the {len(teachers)} other peers, or an axis that "
            "an array lacks"
        ) from error
    return split_terms(result, student.logits.shape[:1], owner)[0]


def _reads_peers(peer: Stage, student: Outputs, teachers: Any, *rest: Any) -> bool:
    """Returns whether a peer's loss depends on the outputs of any other."""
    traced = jax.make_jaxpr(lambda outputs: _call_peer_loss(peer, student, outputs, *rest))(
        teachers
    )
    return any(find_used_inputs(traced.jaxpr))


def _make_taker(name: str) -> Any:
    return lambda variables: joint.take_member(variables, name)


def _join_init_losses(peers: Sequence[Stage]) -> Callable[[Array], Any] | None:
    init_losses = {peer.name: peer.init_loss for peer in peers if peer.init_loss is not None}
    if not init_losses:
        return None

    def init_loss(key: Array) -> dict[str, Any]:
        return {
            name: init(jax.random.fold_in(key, number))
            for number, (name, init) in enumerate(init_losses.items())
        }

    return init_loss


def _join_loss_optimizers(peers: Sequence[Stage]) -> optax.GradientTransformation | None:
    with_params = [peer for peer in peers if peer.init_loss is not None]
    if not with_params:
        return None
    return _partition({peer.name: peer.loss_tx or peer.tx for peer in with_params})


def _partition(optimizers: Mapping[str, optax.GradientTransformation]) -> Any:
    """Returns an optimizer of a dict that gives each entry its own one."""
    # optax declares the keys of a mapping, which does not take a subtype there.
    transforms: Any = dict(optimizers)
    return optax.transforms.partition(transforms, {name: name for name in optimizers})


def _check_peers(peers: Sequence[Stage]) -> None:
    for peer in peers:
        if not isinstance(peer, Stage):
            raise TypeError(
                f"mutual learning needs a list of stages, but it has a {type(peer).__name__}"
            )
    if len(peers) < 2 or len({peer.name for peer in peers}) < len(peers):
        raise ValueError(
            "mutual learning needs at least two stages of different names, got "
            f"{[peer.name for peer in peers]}"
        )
    for peer in peers:
        if peer.needs or peer.teachers or peer.cache_teachers:
            raise ValueError(
                f"the peer {peer.name!r} has teachers or a start: leave them out, its teachers are "
                "the other peers"
            )
        if peer.rewrite is not None:
            raise ValueError(
                f"the peer {peer.name!r} has a rewrite, but peers train in one step on the same "
                "batch: leave it out"
            )
        for attribute in SHARED:
            first, other = getattr(peers[0], attribute), getattr(peer, attribute)
            if not _is_same(first, other):
                raise ValueError(
                    f"the peers {peers[0].name!r} and {peer.name!r} train in one step, but differ "
                    f"in {attribute}: pass the same"
                )


def _is_same(first: Any, other: Any) -> bool:
    # Arrays are compared by identity: by value they would all be read.
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        return first.keys() == other.keys() and all(
            _is_same(first[name], other[name]) for name in first
        )
    if hasattr(first, "dtype") or hasattr(other, "dtype"):
        return first is other
    return first is other or bool(first == other)
