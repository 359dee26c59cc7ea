"""Accuracy, agreement, calibration, size, FLOPs and latency of trained models.

Metrics of predictions are computed on the host in NumPy, from logits that `make_predict` returns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxkd._images import describe_wrong_scale
from jaxkd._messages import describe_lacking_params, list_some
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.data.read_ahead import read_chunks
from jaxkd.data.records import Column, scannable
from jaxkd.losses import hard_cross_entropy
from jaxkd.losses.checks import are_distributions, are_sigmoids

if TYPE_CHECKING:
    from jaxkd.models.model import Model, Outputs

PredictFn = Callable[[dict, Any], np.ndarray]
"""`(variables, inputs [N, ...]) -> logits [N, ..., C]`, float32."""

ScoreFn = Callable[[dict, Mapping[str, Any]], "Score | Mapping[str, float]"]
"""`(variables, examples) -> Score`, or any numbers by name, such as `{"rmse": 0.4}`."""


class Score(NamedTuple):
    """The validation results of a model in training.

    Attributes:
        loss: Mean cross-entropy with the labels.
        accuracy: Share of the examples whose prediction is the label.
    """

    loss: float
    accuracy: float


class ClassificationMetrics(NamedTuple):
    """Metrics of a classifier on labelled examples, as fractions in [0, 1].

    Attributes:
        accuracy: Share of the examples whose prediction is the label.
        ece: Expected calibration error.
        agreement: Share of the examples with the same prediction as a reference model, or `None`.
    """

    accuracy: float
    ece: float
    agreement: float | None


class Latency(NamedTuple):
    """Wall time of a call, in milliseconds.

    Attributes:
        median_ms: Median over the calls.
        p95_ms: 95th percentile over the calls.
    """

    median_ms: float
    p95_ms: float


def make_predict(
    model: Model,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    buckets: LengthBuckets | None = None,
    read: Callable[[Outputs], Any] | None = None,
) -> Callable[[dict, Any], Any]:
    """Makes a function that predicts any number of examples with one compiled program.

    The last batch is filled up by repeating its last example. The extra predictions are dropped.

    Args:
        model: The model.
        batch_size: Number of examples in a batch. By default 512, or the size that `buckets` name.
        mesh: Devices that hold the variables and divide each batch among them. By default, one
            device predicts.
        buckets: For tokens `[N, ..., S]`: examples of similar length are predicted together, cut to
            a bucket length. Each bucket length is compiled.
        read: `Outputs -> tree`: what to return of the outputs of a batch, arrays `[B, ...]`, such
            as `lambda outputs: outputs.features["hidden"]`. By default the logits, in float32.

    Returns:
        `(variables, inputs [N, ...]) -> logits [N, C]`, a float32 NumPy array, or the tree of
        `read` with arrays `[N, ...]`. The inputs are an array, a column of `data.Records`, or a
        dict of them. It raises `ValueError` if N is 0, if the arrays of a dict have different
        lengths, or if there are buckets for a dict.

    Raises:
        ValueError: If the batch size is not positive.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(4,), hidden=8))
        >>> images = np.zeros((5, 8, 8, 3), np.float32)
        >>> predict = evaluate.make_predict(model, batch_size=2)
        >>> predict(model.init(jax.random.key(0), images), images).shape
        (5, 10)
    """
    if batch_size is None:
        batch_size = 512 if buckets is None else buckets.predict_batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    forward = _forward(model, read)
    forward = jax.jit(forward) if mesh is None else _forward_on_mesh(forward, mesh)

    def predict(variables: dict, inputs: Any) -> Any:
        inputs = _as_numpy(inputs)
        _check_lengths(inputs)
        if not _count_rows(inputs):
            shapes = jax.tree.map(np.shape, inputs)
            raise ValueError(f"there is nothing to predict: inputs have the shape {shapes}")
        if not isinstance(inputs, Mapping):
            _warn_of_scale(model, inputs)
        batches = (
            _batches(inputs, batch_size) if buckets is None else buckets.batches(inputs, batch_size)
        )
        all_rows, all_outputs = [], []
        for rows, batch in batches:
            # All batches have one size, so that one program serves them.
            padded = jax.tree.map(lambda array: _pad_rows(array, batch_size), batch)
            # Wait for each batch: batches sent ahead of the computation would fill the memory.
            outputs = jax.device_get(forward(variables, padded))
            all_outputs.append(_take_rows(outputs, len(rows)))
            all_rows.append(rows)
        # Buckets take the rows in another order than that of the inputs.
        order = np.argsort(np.concatenate(all_rows))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *all_outputs)

    return predict


def _warn_of_scale(model: Model, inputs: Any) -> None:
    """Warns if images are on another scale than that of a model."""
    if problem := describe_wrong_scale(model.max_value, scannable(inputs)):
        warnings.warn(f"make_predict is given {problem}", stacklevel=3)


def make_classifier_score(predict: PredictFn) -> Callable[[dict, Mapping[str, Any]], Score]:
    """Makes a function that scores a classifier.

    Args:
        predict: `(variables, inputs [N, ...]) -> logits [N, C]`, as `make_predict` makes it.

    Returns:
        `(variables, examples) -> Score`. The examples are `inputs` `[N, ...]` and `labels` `[N]`.
        Both numbers are NaN if a logit is. It raises `ValueError` if a label is no class of the
        model, and warns if the logits are probabilities or those of a sigmoid.
    """

    def score(variables: dict, examples: Mapping[str, Any]) -> Score:
        return score_logits(predict(variables, examples["inputs"]), examples["labels"])

    return score


def score_logits(logits: np.ndarray, labels: ArrayLike) -> Score:
    """Scores the predictions of a classifier.

    Args:
        logits: `[N, C]`, float32.
        labels: `[N]`, integers in [0, C).

    Returns:
        The score. Both numbers are NaN if a logit is.

    Raises:
        ValueError: If a label is no class of the model.

    Warns:
        UserWarning: If the logits are probabilities or those of a sigmoid.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> evaluate.score_logits(np.array([[2.0, 1.0], [0.0, 3.0]]), [0, 0]).accuracy
        0.5
    """
    _check_labels(logits, labels)
    # A diverged student is reported by the training loop, with its stage and step.
    if np.isnan(logits).any():
        return Score(float("nan"), float("nan"))
    _warn_of_probabilities(logits)
    return Score(float(np.mean(hard_cross_entropy(logits, labels))), accuracy(logits, labels))


def are_probabilities(logits: ArrayLike) -> bool:
    """Returns whether every row is a distribution over several classes, as a softmax gives it.

    A loss that takes logits would compute a second softmax of them. `losses.check_logits` raises an
    error for such logits.

    Args:
        logits: `[..., C]`.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.are_probabilities([[0.7, 0.3]]), evaluate.are_probabilities([[2.0, 1.0]])
        (True, False)
    """
    return are_distributions(logits)


def _warn_of_probabilities(logits: ArrayLike) -> None:
    if are_probabilities(logits):
        warnings.warn(
            "the logits of a model are probabilities, each row sums to 1: return the logits "
            "before its softmax, or their logarithm",
            stacklevel=3,
        )
    elif are_sigmoids(logits):
        warnings.warn(
            "all logits of a model are between 0 and 1, as a sigmoid gives them: return the logits "
            "before it, since a softmax of them is nearly uniform",
            stacklevel=3,
        )


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Computes the share of the examples whose largest logit is at their label.

    The first of equal logits counts as the largest.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, integers in [0, C).

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes disagree, there is no example, the logits are of one class, or a
            logit is NaN.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.accuracy([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]], [0, 1, 1])
        0.667
    """
    logits = _check_logits("logits", logits)
    return float(np.mean(logits.argmax(-1) == _check_labels(logits, labels)))


def chance_accuracy(labels: ArrayLike) -> float:
    """Computes the accuracy of the best constant prediction: the share of the commonest class.

    Args:
        labels: `[N]`, integers.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If there is no label, or labels are no integers `[N]`, such as one-hot ones.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.chance_accuracy([0, 1, 1, 2])
        0.5
    """
    labels = np.asarray(labels)
    if not labels.size:
        raise ValueError("there is no label to count")
    # The entries of one-hot labels would be counted, most of which are 0.
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [N], got {labels.dtype} {list(labels.shape)}: pass "
            "labels.argmax(-1) of one-hot labels"
        )
    _, counts = np.unique(labels, return_counts=True)
    return float(counts.max() / labels.size)


def accuracy_interval(
    correct: float, total: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Computes Wilson's score interval for a share that was observed in a sample.

    (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n) with p = correct / n

    The interval is within [0, 1]. Unlike that of p ± z standard errors, its coverage is close to
    the nominal one even if p is near 0 or 1.

    Args:
        correct: Number of correct predictions. It may be a fraction, such as a mean over seeds.
        total: Number of predictions, n.
        confidence: Nominal coverage of the interval, in (0, 1).

    Returns:
        The lower and the upper end, as fractions.

    Raises:
        ValueError: If `total` is not positive, or `correct` or `confidence` is out of range.

    Example:
        >>> from jaxkd import evaluate
        >>> low, high = evaluate.accuracy_interval(90, 100)
        >>> low, high
        (0.826, 0.945)

    References:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927,
        https://doi.org/10.1080/01621459.1927.10502953
    """
    if total < 1 or not 0 <= correct <= total or not 0 < confidence < 1:
        raise ValueError(
            "an interval needs 0 <= correct <= total, 1 <= total and 0 < confidence < 1; "
            f"got correct={correct}, total={total}, confidence={confidence}"
        )
    share = correct / total
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z**2 / (2 * total)
    reach = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    low = (centre - reach) / (1 + z**2 / total)
    high = (centre + reach) / (1 + z**2 / total)
    # The formula stays within the range, but its rounding errors may leave it.
    return max(low, 0.0), min(high, 1.0)


def agreement(logits: ArrayLike, reference_logits: ArrayLike) -> float:
    """Computes the share of the examples for which two models predict the same class.

    Args:
        logits: `[N, C]`.
        reference_logits: `[N, C]`, the logits of the other model, such as the teacher.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes disagree, there is no example or a logit is NaN.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.agreement([[2.0, 1.0], [0.0, 3.0]], [[9.0, 1.0], [4.0, 3.0]])
        0.5

    References:
        Stanton et al., Does Knowledge Distillation Really Work?, https://arxiv.org/abs/2106.05945
    """
    logits = _check_logits("logits", logits)
    reference_logits = _check_logits("reference_logits", reference_logits)
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits {logits.shape} and reference_logits {reference_logits.shape} "
            "must have the same shape"
        )
    return float(np.mean(logits.argmax(-1) == reference_logits.argmax(-1)))


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> float:
    """Computes the mean distance between confidence and accuracy, over bins of equal width.

    Σ_b (n_b / n) |accuracy_b − confidence_b|

    Bin b holds the examples whose largest probability is in ((b − 1) / bins, b / bins].

    Args:
        logits: `[N, C]`. Their probabilities are computed in float64.
        labels: `[N]`, integers in [0, C).
        bins: Number of bins.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes disagree, there is no example or bin, the logits are of one class,
            a logit is NaN, or the largest of an example is infinite.

    Warns:
        UserWarning: If the logits are probabilities, or all between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> evaluate.expected_calibration_error(np.log([[0.9, 0.1], [0.9, 0.1]]), [0, 1])
        0.4

    References:
        Guo et al., On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
    """
    if not isinstance(bins, (int, np.integer)) or bins < 1:
        raise ValueError(f"bins must be a positive integer, got {bins!r}")
    logits = _check_logits("logits", logits).astype(np.float64)
    _warn_of_probabilities(logits)
    largest = logits.max(-1)
    if not np.isfinite(largest).all():
        raise ValueError(
            f"the largest logit of {np.sum(~np.isfinite(largest)):,} of {len(logits):,} examples "
            "is infinite, which gives no probability: clip the logits, as by np.clip(logits, "
            "-1e4, 1e4)"
        )
    correct = logits.argmax(-1) == _check_labels(logits, labels)
    # Relative to the largest logit, whose exponential is 1, so that none overflows.
    confidence = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    # "left" puts a confidence on an edge into the bin below it.
    bin_indices = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1
    # Sums instead of means: n_b cancels in the formula, and an empty bin is no special case.
    gaps = np.bincount(bin_indices, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(logits))


def parameter_count(variables: dict) -> int:
    """Counts the trained parameters of a model, without its statistics.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
        The number of parameters.

    Raises:
        ValueError: If the variables lack the level `params`.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> params = {"kernel": np.zeros((3, 4))}
        >>> evaluate.parameter_count({"params": params, "batch_stats": {"mean": np.zeros(4)}})
        12
    """
    if problem := describe_lacking_params(variables):
        raise ValueError(problem)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def parameter_bytes(variables: dict) -> int:
    """Computes the memory of all that a model needs to predict: parameters and statistics.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
        The number of bytes.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> params = {"kernel": np.zeros((3, 4), np.float32)}
        >>> evaluate.parameter_bytes({"params": params, "batch_stats": {}})
        48
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def flops(model: Model, variables: dict, inputs: Any) -> float | None:
    """Counts the floating-point operations of the prediction of one example.

    This is XLA's count for the program before it is compiled for a CPU, whatever the device in use.
    A multiplication and an addition are two operations, and an elementwise operation is one per
    element. Exponentials and other transcendental functions, and products with padding, are not
    counted.

    Args:
        model: The model.
        variables: The variables, of which only shapes and dtypes matter.
        inputs: `[B, ...]`, an array or a dict of arrays, of which only shape and dtype matter.

    Returns:
        The count. It is `None` if JAX has no CPU backend, if the backend does not count, or if the
        program has a loop, as that of a recurrent network.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(32, 64), hidden=64))
        >>> images = jnp.zeros((1, 32, 32, 3))
        >>> evaluate.flops(model, model.init(jax.random.key(0), images), images) / 1e6
        8.2
    """
    # Lowered from shapes alone: nothing runs, and no weights are copied to the CPU.
    # JAX makes float32 of float64.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf)), variables
    )
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x)),
        inputs,
        is_leaf=lambda x: not isinstance(x, Mapping),
    )
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    # Compilers for GPUs put convolutions into library calls, which XLA counts as nothing.
    with jax.default_device(cpu):
        lowered = jax.jit(_forward(model)).lower(shapes, example)
        costs = lowered.cost_analysis()
    # XLA counts a single iteration of a loop.
    if "stablehlo.while" in lowered.as_text():
        return None
    return float(costs["flops"]) if costs and "flops" in costs else None


def latency(
    model: Model, variables: dict, inputs: Any, *, repeats: int = 50, warmup: int = 5
) -> Latency:
    """Measures the wall time of predicting one batch that is on the device already.

    Each call ends before the next one starts, so the time includes the launch of the program.

    Args:
        model: The model.
        variables: The variables of the model.
        inputs: `[B, ...]`, one batch, an array or a dict of arrays.
        repeats: Number of calls that are timed.
        warmup: Number of calls before them. The first one compiles.

    Returns:
        The median and the 95th percentile.

    Raises:
        ValueError: If `repeats` or `warmup` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(4,), hidden=8))
        >>> images = jnp.zeros((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> time = evaluate.latency(model, variables, images, repeats=3)
        >>> 0 < time.median_ms <= time.p95_ms
        True
    """
    forward = jax.jit(_forward(model))
    variables, inputs = jax.device_put((variables, inputs))
    times = time_calls(lambda: forward(variables, inputs), repeats=repeats, warmup=warmup)
    return Latency(*(float(quantile) for quantile in np.percentile(times, [50, 95])))


def time_calls(call: Callable[[], Any], *, repeats: int, warmup: int = 1) -> np.ndarray:
    """Measures the wall time of calls. Each call ends before the next one starts.

    Args:
        call: The function to time. It returns arrays, for which the timer waits.
        repeats: Number of calls that are timed.
        warmup: Number of calls before them. The first one may compile.

    Returns:
        `[repeats]`, the time of each call in milliseconds.

    Raises:
        ValueError: If `repeats` or `warmup` is not positive.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"repeats and warmup must be positive, got {repeats} and {warmup}")
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times[warmup:])


def classification_metrics(
    logits: ArrayLike, labels: ArrayLike, *, reference_logits: ArrayLike | None = None
) -> ClassificationMetrics:
    """Computes accuracy, calibration and agreement of one model.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, integers in [0, C).
        reference_logits: `[N, C]`, the logits of the model to agree with, such as the teacher.

    Returns:
        The metrics. `agreement` is `None` without a reference.

    Raises:
        ValueError: If the shapes disagree, there is no example, the logits are of one class, or a
            logit is NaN.

    Warns:
        UserWarning: If the logits are probabilities, or all between 0 and 1.

    Example:
        >>> from jaxkd import evaluate
        >>> metrics = evaluate.classification_metrics([[2.0, 1.0], [0.0, 3.0]], [0, 0])
        >>> metrics.accuracy, round(metrics.ece, 3), metrics.agreement
        (0.5, 0.611, None)
    """
    return ClassificationMetrics(
        accuracy=accuracy(logits, labels),
        ece=expected_calibration_error(logits, labels),
        agreement=None if reference_logits is None else agreement(logits, reference_logits),
    )


def _as_numpy(inputs: Any) -> Any:
    """Returns an array, or the arrays of a dict, as NumPy's."""
    if isinstance(inputs, Mapping):
        return {name: _as_numpy(array) for name, array in inputs.items()}
    return inputs if isinstance(inputs, Column) else np.asarray(inputs)


def _check_lengths(inputs: Any) -> None:
    """Raises `ValueError` if the arrays of a dict have different numbers of rows."""
    if not isinstance(inputs, Mapping):
        return
    lengths = {name: len(array) for name, array in inputs.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(
            "the inputs of a dict must have one row per example, but their lengths differ: "
            + list_some(f"{name} has {length}" for name, length in lengths.items())
        )


def _count_rows(inputs: Any) -> int:
    return min(len(array) for array in jax.tree.leaves(inputs))


def _take_rows(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda array: array[:count], tree)


def _pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last row up to a number of rows."""
    return np.pad(array, [(0, count - len(array)), *[(0, 0)] * (array.ndim - 1)], mode="edge")


def _batches(inputs: Any, batch_size: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Iterates over the row indices and the rows of each batch, in order."""
    count = _count_rows(inputs)
    starts = range(0, count, batch_size)
    chunks = [np.arange(start, min(start + batch_size, count)) for start in starts]
    yield from zip(chunks, read_chunks(inputs, chunks), strict=True)


def _forward(
    model: Model, read: Callable[[Outputs], Any] | None = None
) -> Callable[[dict, Any], Any]:
    read = read or (lambda outputs: outputs.logits.astype(jnp.float32))
    return lambda variables, inputs: read(model.apply(variables, inputs, train=False)[0])


def _forward_on_mesh(forward: Callable[[dict, Any], Any], mesh: Mesh) -> Callable[[dict, Any], Any]:
    """Divides a batch among all devices of a mesh. Each device gets the whole result."""

    def sharded_forward(variables: dict, inputs: Any) -> Any:
        by_example = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return forward(variables, jax.lax.with_sharding_constraint(inputs, by_example))

    # Whole on every device, because a process can only read arrays of which it holds all parts.
    return jax.jit(sharded_forward, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _check_logits(name: str, logits: ArrayLike) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(
            f"{name} must be [N, C] with at least one example, got the shape {logits.shape}"
        )
    if logits.shape[1] == 1:
        raise ValueError(
            f"{name} {logits.shape}: one logit per example has no classes, the largest is always "
            "class 0; for two classes pass np.concatenate([0 * z, z], 1) of a sigmoid's logit z"
        )
    if np.isnan(logits).any():
        raise ValueError(f"{name} hold NaN, which gives no prediction: the model has diverged")
    return logits


def _check_labels(logits: np.ndarray, labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {labels.shape} must be one per row of the logits {logits.shape}")
    if problem := describe_labels(labels, logits.shape[-1]):
        raise ValueError(problem)
    return labels


def describe_labels(labels: ArrayLike, num_classes: int) -> str:
    """Describes the labels that are no class of a model; an empty string if all are classes.

    Args:
        labels: Integers of any shape.
        num_classes: Number of the model's logits, C.

    Returns:
        A clause such as "3 of 20 labels are -1, which is not in [0, 10), the classes of the model".
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        return f"labels must be integers, got {labels.dtype}"
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if not outside.size:
        return ""
    if num_classes == 1:
        return (
            "its model has one output, whose softmax is always 1: for a sigmoid pass a make_score, "
            "or make it of two outputs"
        )
    smallest, largest = outside.min(), outside.max()
    values = f"{smallest}" if smallest == largest else f"from {smallest} to {largest}"
    return (
        f"{outside.size:,} of {labels.size:,} labels are {values}, which is not in "
        f"[0, {num_classes}), the classes of the model"
    )
