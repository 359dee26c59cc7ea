"""Cross-layer alignment: student layers attend over all teacher layers instead of fixed pairs.

The losses have parameters of their own, which are trained with the student and dropped after the
training. In a stage of a plan they are used like this:

    def loss(student, teachers, batch, context):
        student_states = [student.features[name] for name in ("stage1", "stage2")]
        teacher_states = [teachers[0].features[name] for name in ("stage1", "stage2", "stage3")]
        return losses.semantic_calibration_loss(
            context.params, student_states, teacher_states
        )

    def init_loss(key):
        return losses.init_semantic_calibration(key, (16, 32), (64, 128, 256), features=64)

    distill.Stage("student", ..., loss=loss, init_loss=init_loss, teachers=("teacher",))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd import attention
from jaxkd.losses._arrays import check_shape, normalize, upcast, upcast_pair, widest_dtype
from jaxkd.losses._maps import average_pool
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
        `queries` and `keys`, an affine map to F from each student layer and from each teacher
        layer; and `projectors`, for each student layer one affine map to each teacher layer. A map
        is `{"kernel": [in, out], "bias": [out]}` in float32, from `features.init_projector`.

    Raises:
        ValueError: If the student or the teacher has no layers.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_semantic_calibration(
        ...     jax.random.key(0), (8, 16), (8, 16, 32), features=4
        ... )
        >>> len(params["queries"]), len(params["keys"]), params["keys"][2]["kernel"].shape
        (2, 3, (32, 4))
        >>> params["projectors"][1][2]["kernel"].shape
        (16, 32)
    """
    check_shape(
        len(student_features) > 0 and len(teacher_features) > 0,
        "student and teacher need at least one layer, "
        f"got widths {student_features} and {teacher_features}",
    )
    query_key, keys_key, projector_key = jax.random.split(key, 3)
    projectors = []
    for subkey, student_width in zip(
        jax.random.split(projector_key, len(student_features)), student_features, strict=True
    ):
        sizes = [(student_width, teacher_width) for teacher_width in teacher_features]
        projectors.append(_init_affine_maps(subkey, sizes))
    return {
        "queries": _init_affine_maps(query_key, [(width, features) for width in student_features]),
        "keys": _init_affine_maps(keys_key, [(width, features) for width in teacher_features]),
        "projectors": projectors,
    }


def cross_layer_weights(
    params: Mapping[str, Any],
    student_states: Sequence[ArrayLike],
    teacher_states: Sequence[ArrayLike],
) -> Array:
    """Computes each student layer's attention over the teacher layers, for each example.

    α_ij = softmax over j of q_i · k_j / √F, where q_i and k_j are learned affine maps of a layer's
    features, averaged over positions and divided by their root mean square, or 0 where that is 0

    Args:
        params: From `init_semantic_calibration`.
        student_states: One array per layer: maps `[B, H, W, C]`, tokens `[B, N, C]` or vectors
            `[B, C]`.
        teacher_states: The same for the teacher.

    Returns:
        Weights `[B, student layers, teacher layers]` in float32 or wider, with sum 1 over the
        teacher's layers.

    Raises:
        ValueError: If the states do not fit the parameters or each other.
        TypeError: If a state is not floating-point.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_semantic_calibration(jax.random.key(0), (2,), (3, 3), features=4)
        >>> params["keys"] = [params["keys"][0], params["keys"][0]]
        >>> student = [jnp.ones((1, 8, 8, 2))]
        >>> teacher = [jnp.ones((1, 8, 8, 3)), jnp.ones((1, 4, 4, 3))]
        >>> print(losses.cross_layer_weights(params, student, teacher))
        [[[0.5 0.5]]]

    References:
        Chen et al., Cross-Layer Distillation with Semantic Calibration,
        https://arxiv.org/abs/2012.03236
    """
    return _attention_weights(params, *_check_layers(params, student_states, teacher_states))


def semantic_calibration_loss(
    params: Mapping[str, Any],
    student_states: Sequence[ArrayLike],
    teacher_states: Sequence[ArrayLike],
) -> Array:
    """Computes distances of student layers to all teacher layers, weighted by attention (SemCKD).

    (1/L) Σ_i Σ_j α_ij mean((W_ij s_i + b_ij − t_j)²) over the student's L layers i, with α of
    `cross_layer_weights`

    Where the two maps of a pair differ in size, the larger is averaged to the size of the smaller
    along each spatial axis, in the windows of PyTorch's adaptive pooling, as in the authors' code.

    Otherwise it differs from that code. Its queries and keys are networks over an example's row of
    the batch's similarity matrix, which ties the parameters to one batch size and an example's
    weights to the other examples; here they are affine maps of the example's own features. It
    scales queries and keys to length 1, so that no layer outweighs another by more than e²; here
    their length is free. It projects a pair by three convolutions with batch normalisation; here
    one 1×1 convolution is used.

    All tokens count, including padding: for padded sequences, average the tokens that count and
    pass vectors.

    Args:
        params: From `init_semantic_calibration`; they are trained with the student.
        student_states: One array per layer: maps `[B, H, W, C]`, tokens `[B, N, C]` or vectors
            `[B, C]`.
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
        >>> student = [jnp.zeros((1, 8, 8, 2))]
        >>> teacher = [jnp.ones((1, 8, 8, 3)), 2 * jnp.ones((1, 4, 4, 5))]
        >>> print(losses.semantic_calibration_loss(params, student, teacher))  # (1² + 2²) / 2
        [2.5]

    References:
        Chen et al., Cross-Layer Distillation with Semantic Calibration,
        https://arxiv.org/abs/2012.03236
    """
    student, teacher = _check_layers(params, student_states, teacher_states)
    distances = []
    for student_state, projectors in zip(student, params["projectors"], strict=True):
        layer_distances = [
            _projected_mse(student_state, teacher_state, projector)
            for teacher_state, projector in zip(teacher, projectors, strict=True)
        ]
        distances.append(jnp.stack(layer_distances, axis=-1))
    weights = _attention_weights(params, student, teacher)
    # The gradient of the weights is kept: attention moves to the layers that the student can match.
    return jnp.sum(weights * jnp.stack(distances, axis=1), axis=-1).mean(-1)


def init_aligned_states(key: Array, student_features: int, teacher_features: int) -> dict[str, Any]:
    """Draws the parameters of `aligned_states_loss`.

    Args:
        key: A random key.
        student_features: Width of the student's states.
        teacher_features: Width of the teacher's states.

    Returns:
        `queries` and `projector`, two affine maps from the student's width to the teacher's, each
        `{"kernel": [in, out], "bias": [out]}` in float32, from `features.init_projector`.
    """
    queries, projector = _init_affine_maps(key, [(student_features, teacher_features)] * 2)
    return {"queries": queries, "projector": projector}


def aligned_states_loss(
    params: Mapping[str, Any], student_states: ArrayLike, teacher_states: ArrayLike
) -> Array:
    """Computes the distance of student states to the teacher states that they attend to.

    mean((W s_i + b − c_i)²) over student layers i, where c_i = Σ_j α_ij t_j, α_ij = softmax over j
    of q_i · k_j / √D', k_j is t_j divided by its root mean square, or 0, and q_i is a learned
    affine map of s_i divided by its own

    The attention is that of SemCKD, with one map for all layers. The distance is that from the mean
    of the teacher's layers, where SemCKD takes the mean of the distances; it is smaller by the
    spread of the layers.

    Args:
        params: From `init_aligned_states`; they are trained with the student.
        student_states: `[B, L, D]`, floating-point, one vector per layer.
        teacher_states: `[B, M, D']`; the number of layers and their width may differ.

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
        Chen et al., Cross-Layer Distillation with Semantic Calibration,
        https://arxiv.org/abs/2012.03236
    """
    student, teacher = upcast_pair(
        ("student_states", "teacher_states"), student_states, teacher_states
    )
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
    queries = project(params["queries"], _rms_normalize(student))
    # The keys are normalised but the values are not: the student learns the teacher's own scale.
    context, _ = attention.attend(queries, _rms_normalize(teacher), teacher)
    return hint_loss(project(params["projector"], student), context)


def _check_layers(
    params: Mapping[str, Any],
    student_states: Sequence[ArrayLike],
    teacher_states: Sequence[ArrayLike],
) -> tuple[list[Array], list[Array]]:
    """Returns the states of all layers in one dtype; raises if they do not fit the parameters."""
    student = [upcast(f"student_states[{i}]", state) for i, state in enumerate(student_states)]
    teacher = [upcast(f"teacher_states[{j}]", state) for j, state in enumerate(teacher_states)]
    for side, states, affine_maps in (
        ("student", student, params["queries"]),
        ("teacher", teacher, params["keys"]),
    ):
        check_shape(
            len(states) == len(affine_maps),
            f"the parameters are for {len(affine_maps)} {side} layers, got {len(states)}",
        )
        for i, (state, affine_map) in enumerate(zip(states, affine_maps, strict=True)):
            width = jnp.shape(affine_map["kernel"])[0]
            check_shape(
                state.ndim >= 2 and state.shape[-1] == width,
                f"{side}_states[{i}] {state.shape} must have {width} features on its last axis, "
                "as the parameters do",
            )
    shapes = [state.shape for state in student + teacher]
    check_shape(
        len({(shape[0], len(shape)) for shape in shapes}) == 1,
        "all layers must be maps [B, H, W, C], or all tokens [B, N, C] or vectors [B, C], "
        f"of one B, got {shapes}",
    )
    dtype = widest_dtype(*student, *teacher)
    return [state.astype(dtype) for state in student], [state.astype(dtype) for state in teacher]


def _attention_weights(
    params: Mapping[str, Any], student: Sequence[Array], teacher: Sequence[Array]
) -> Array:
    queries = _embed_layers(params["queries"], student)
    keys = _embed_layers(params["keys"], teacher)
    # Only the weights are used, which do not depend on the values.
    _, weights = attention.attend(queries, keys, keys)
    return weights


def _embed_layers(affine_maps: Sequence[dict[str, Array]], states: Sequence[Array]) -> Array:
    """Maps the mean features of each layer to queries or keys, `[B, layers, F]`."""
    embedded = []
    for affine_map, state in zip(affine_maps, states, strict=True):
        positions = tuple(range(1, state.ndim - 1))
        embedded.append(project(affine_map, _rms_normalize(state.mean(positions))))
    return jnp.stack(embedded, axis=1)


def _rms_normalize(vectors: Array) -> Array:
    """Divides vectors by their root mean square. Zero vectors stay 0."""
    # The scores then start with a variance near 1, whatever the scale of a layer's features.
    return normalize(vectors) * vectors.shape[-1] ** 0.5


def _projected_mse(state: Array, target: Array, projector: dict[str, Array]) -> Array:
    """Computes the mean squared difference `[B]` of a projected state at the smaller map size."""
    for axis in range(1, state.ndim - 1):
        size = min(state.shape[axis], target.shape[axis])
        state = average_pool(state, axis, size)
        target = average_pool(target, axis, size)
    # Pooled before the projection: an average commutes with an affine map, and the smaller map is
    # cheaper to project.
    return hint_loss(project(projector, state), target)


def _init_affine_maps(key: Array, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Array]]:
    return [
        init_projector(subkey, *size)
        for subkey, size in zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    ]
