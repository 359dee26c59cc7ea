"""Cross-layer alignment: student layers attend over all of the teacher's layers, instead of being paired by hand.

The losses have parameters of their own, which learn with the student and are dropped after the training. In a plan's
stage they compose like this:

    def loss(student, teachers, batch, params):
        student_states = [student.features[name] for name in ("stage1", "stage2")]
        teacher_states = [teachers[0].features[name] for name in ("stage1", "stage2", "stage3")]
        return losses.semantic_calibration_loss(params, student_states, teacher_states)

    def init_loss(key):
        return losses.init_semantic_calibration(key, (16, 32), (64, 128, 256), features=64)

    distill.Stage("student", ..., loss=loss, init_loss=init_loss, teachers=("teacher",))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd import attention
from jaxkd.losses._arrays import check_shape, normalize, wide, wide_pair
from jaxkd.losses.features import hint_loss, init_projector, project


def init_semantic_calibration(
    key: Array, student_features: Sequence[int], teacher_features: Sequence[int], features: int
) -> dict[str, Any]:
    """Draws the parameters of `semantic_calibration_loss`.

    Args:
        key: A random key.
        student_features: Width (channels) of each student layer.
        teacher_features: Width of each teacher layer.
        features: Width F of queries and keys.

    Returns:
        `queries` and `keys`, a map from each student layer and from each teacher layer to F; and `projectors`, for each
        student layer one map to each teacher layer. A map is `{"kernel": [in, out], "bias": [out]}` in float32, as of
        `features.init_projector`.

    Raises:
        ValueError: If the student or the teacher has no layers.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_semantic_calibration(jax.random.key(0), (8, 16), (8, 16, 32), features=4)
        >>> len(params["queries"]), len(params["keys"]), params["keys"][2]["kernel"].shape
        (2, 3, (32, 4))
        >>> params["projectors"][1][2]["kernel"].shape
        (16, 32)
    """
    check_shape(
        len(student_features) > 0 and len(teacher_features) > 0,
        f"student and teacher need at least one layer, got widths {student_features} and {teacher_features}",
    )
    query_key, keys_key, projector_key = jax.random.split(key, 3)
    return {
        "queries": _init_maps(query_key, [(width, features) for width in student_features]),
        "keys": _init_maps(keys_key, [(width, features) for width in teacher_features]),
        "projectors": [
            _init_maps(subkey, [(student, teacher) for teacher in teacher_features])
            for subkey, student in zip(
                jax.random.split(projector_key, len(student_features)), student_features, strict=True
            )
        ],
    }


def cross_layer_weights(
    params: Mapping[str, Any], student_states: Sequence[ArrayLike], teacher_states: Sequence[ArrayLike]
) -> Array:
    """How much each student layer attends to each teacher layer, for each example.

    α_ij = softmax over j of q_i · k_j / √F, where q_i and k_j are learned affine maps of a layer's features, averaged
    over positions and divided by their root mean square, or 0 where that is 0

    Args:
        params: From `init_semantic_calibration`.
        student_states: One array per layer: maps `[B, H, W, C]`, tokens `[B, N, C]` or vectors `[B, C]`.
        teacher_states: The same for the teacher.

    Returns:
        Weights `[B, student layers, teacher layers]` in float32 or wider, which sum to 1 over the teacher's layers.

    Raises:
        ValueError: If the states do not fit the parameters or each other.
        TypeError: If a state is not floating-point.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_semantic_calibration(jax.random.key(0), (2,), (3, 3), features=4)
        >>> params["keys"] = [params["keys"][0], params["keys"][0]]
        >>> student, teacher = [jnp.ones((1, 8, 8, 2))], [jnp.ones((1, 8, 8, 3)), jnp.ones((1, 4, 4, 3))]
        >>> print(losses.cross_layer_weights(params, student, teacher))
        [[[0.5 0.5]]]

    References:
        Chen et al., Cross-Layer Distillation with Semantic Calibration, https://arxiv.org/abs/2012.03236
    """
    return _weights(params, *_layers(params, student_states, teacher_states))


def semantic_calibration_loss(
    params: Mapping[str, Any], student_states: Sequence[ArrayLike], teacher_states: Sequence[ArrayLike]
) -> Array:
    """SemCKD: each student layer is pulled to all teacher layers, each by as much as it attends to it.

    (1/L) Σ_i Σ_j α_ij mean((W_ij s_i + b_ij − t_j)²) over the student's L layers i, with α of `cross_layer_weights`

    Where the two maps of a pair differ in size, the larger is averaged to the size of the smaller along each spatial
    axis, in the windows of PyTorch's adaptive pooling, as in the authors' code. Elsewhere it differs. Its queries
    and keys are networks over an example's row of the batch's similarity matrix, which ties the parameters to one batch
    size and an example's weights to the others of its batch; here they are affine maps of the example's own features.
    It scales them to length 1, so that no layer outweighs another by more than e²; here they are free. And it projects
    a pair by three convolutions with batch normalisation, where one 1×1 convolution does here.

    Tokens all count, padded ones too: where there are some, average the others and give vectors.

    Args:
        params: From `init_semantic_calibration`; they learn with the student.
        student_states: One array per layer: maps `[B, H, W, C]`, tokens `[B, N, C]` or vectors `[B, C]`.
        teacher_states: The same for the teacher.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the states do not fit the parameters or each other.
        TypeError: If a state is not floating-point.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_semantic_calibration(jax.random.key(0), (2,), (3, 5), features=4)
        >>> student, teacher = [jnp.zeros((1, 8, 8, 2))], [jnp.ones((1, 8, 8, 3)), 2 * jnp.ones((1, 4, 4, 5))]
        >>> print(losses.semantic_calibration_loss(params, student, teacher))  # (1² + 2²) / 2
        [2.5]

    References:
        Chen et al., Cross-Layer Distillation with Semantic Calibration, https://arxiv.org/abs/2012.03236
    """
    student, teacher = _layers(params, student_states, teacher_states)
    distances = [
        jnp.stack([_distance(state, target, own) for target, own in zip(teacher, projectors, strict=True)], axis=-1)
        for state, projectors in zip(student, params["projectors"], strict=True)
    ]
    return jnp.sum(_weights(params, student, teacher) * jnp.stack(distances, axis=1), axis=-1).mean(-1)


def init_aligned_states(key: Array, student_features: int, teacher_features: int) -> dict[str, Any]:
    """Draws the parameters of `aligned_states_loss`.

    Args:
        key: A random key.
        student_features: Width of the student's states.
        teacher_features: Width of the teacher's states.

    Returns:
        `queries` and `projector`, two maps from the student's width to the teacher's, each
        `{"kernel": [in, out], "bias": [out]}` in float32, as of `features.init_projector`.
    """
    queries, projector = _init_maps(key, [(student_features, teacher_features)] * 2)
    return {"queries": queries, "projector": projector}


def aligned_states_loss(params: Mapping[str, Any], student_states: ArrayLike, teacher_states: ArrayLike) -> Array:
    """Student states attend over all teacher layers and are pulled to the context that they get.

    mean((W s_i + b − c_i)²) over student layers i, where c_i = Σ_j α_ij t_j, α_ij = softmax over j of q_i · k_j / √D',
    k_j is t_j divided by its root mean square, or 0, and q_i is a learned affine map of s_i divided by its own

    Of SemCKD this keeps the attention, with one map for all layers; the distance is that from the mean of the teacher's
    layers instead of the mean of the distances from them, smaller by the layers' spread.

    Args:
        params: From `init_aligned_states`; they learn with the student.
        student_states: `[B, L, D]`, floating-point, one vector per layer.
        teacher_states: `[B, M, D']`, as many layers and as wide as the teacher has them.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the states do not fit the parameters or each other.
        TypeError: If the states are not floating-point.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_aligned_states(jax.random.key(0), 2, 3)
        >>> student, teacher = jnp.zeros((1, 2, 2)), jnp.ones((1, 5, 3))
        >>> print(losses.aligned_states_loss(params, student, teacher))
        [1.]

    References:
        Chen et al., Cross-Layer Distillation with Semantic Calibration, https://arxiv.org/abs/2012.03236
    """
    student, teacher = wide_pair(("student_states", "teacher_states"), student_states, teacher_states)
    check_shape(
        student.ndim == teacher.ndim == 3 and len(student) == len(teacher),
        "student_states and teacher_states must be [B, layers, D] of the same examples, "
        f"got {student.shape} and {teacher.shape}",
    )
    widths = jnp.shape(params["projector"]["kernel"])
    check_shape(
        (student.shape[-1], teacher.shape[-1]) == widths,
        f"the parameters are for states of {widths[0]} and {widths[1]} features, "
        f"got {student.shape} and {teacher.shape}",
    )
    queries = project(params["queries"], _level(student))
    context, _ = attention.attend(queries, _level(teacher), teacher)
    return hint_loss(project(params["projector"], student), context)


def _layers(
    params: Mapping[str, Any], student_states: Sequence[ArrayLike], teacher_states: Sequence[ArrayLike]
) -> tuple[list[Array], list[Array]]:
    """The states of all layers in one wide dtype, checked."""
    student = [wide(f"student_states[{i}]", state) for i, state in enumerate(student_states)]
    teacher = [wide(f"teacher_states[{j}]", state) for j, state in enumerate(teacher_states)]
    for name, states, maps in (("student", student, params["queries"]), ("teacher", teacher, params["keys"])):
        check_shape(len(states) == len(maps), f"the parameters are for {len(maps)} {name} layers, got {len(states)}")
        for i, (state, own) in enumerate(zip(states, maps, strict=True)):
            width = jnp.shape(own["kernel"])[0]
            check_shape(
                state.ndim >= 2 and state.shape[-1] == width,
                f"{name}_states[{i}] {state.shape} must have {width} features on its last axis, as the parameters do",
            )
    shapes = [state.shape for state in student + teacher]
    check_shape(
        len({(shape[0], len(shape)) for shape in shapes}) == 1,
        f"all layers must be maps [B, H, W, C], or all tokens [B, N, C] or vectors [B, C], of one B, got {shapes}",
    )
    dtype = max((state.dtype for state in student + teacher), key=lambda dtype: dtype.itemsize)
    return [state.astype(dtype) for state in student], [state.astype(dtype) for state in teacher]


def _weights(params: Mapping[str, Any], student: Sequence[Array], teacher: Sequence[Array]) -> Array:
    queries, keys = (
        jnp.stack([project(own, _level(_average(state))) for own, state in zip(maps, states, strict=True)], axis=1)
        for maps, states in ((params["queries"], student), (params["keys"], teacher))
    )
    return attention.attend(queries, keys, keys)[1]


def _average(state: Array) -> Array:
    """`[B, ..., C]` averaged over its positions to `[B, C]`."""
    return state.mean(tuple(range(1, state.ndim - 1)))


def _level(vectors: Array) -> Array:
    """Vectors of mean square 1, or 0: scores begin with variance 1, whatever the size of a layer's numbers."""
    return normalize(vectors) * vectors.shape[-1] ** 0.5


def _distance(state: Array, target: Array, projector: dict[str, Array]) -> Array:
    """Mean squared difference `[B]` of a projected student layer from a teacher layer, at the smaller size of both."""
    for axis in range(1, state.ndim - 1):
        size = min(state.shape[axis], target.shape[axis])
        state, target = _shrink(state, axis, size), _shrink(target, axis, size)
    return hint_loss(project(projector, state), target)


def _shrink(state: Array, axis: int, size: int) -> Array:
    """Means of the windows [⌊i n / size⌋, ⌈(i + 1) n / size⌉) of an axis of length n, which overlap if they must."""
    length = state.shape[axis]
    if length == size:
        return state
    first, position = np.arange(size)[:, None] * length, np.arange(length)[None]
    inside = (position >= first // size) & (position < -(-(first + length) // size))
    means = jnp.asarray(inside / inside.sum(1, keepdims=True), state.dtype)
    # At full precision: elsewhere an average is a sum, which no accelerator rounds.
    return jnp.moveaxis(jnp.tensordot(state, means, (axis, 1), precision="highest"), -1, axis)


def _init_maps(key: Array, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Array]]:
    return [
        init_projector(subkey, *size) for subkey, size in zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    ]
