"""What a trained model is worth and what it costs: accuracy, agreement, calibration, size, work and time.

Numbers about predictions are computed on the host in NumPy, from logits that `make_predict` brings there once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxkd.buckets import by_length
from jaxkd.losses import hard_cross_entropy

if TYPE_CHECKING:
    from jaxkd.models.model import Model

TIMINGS = ("latency_ms", "latency_p95_ms", "throughput_latency_ms", "throughput_latency_p95_ms", "seconds")
"""Keys of a row that differ from one run to the next; a comparison of reruns drops them."""


class Score(NamedTuple):
    """How a model in training does on the validation split.

    Attributes:
        loss: Mean cross-entropy with the labels.
        accuracy: Share of the labels that it gets right.
    """

    loss: float
    accuracy: float


class Latency(NamedTuple):
    """How long one call takes, in milliseconds of wall time.

    Attributes:
        median_ms: Half of the calls were faster.
        p95_ms: 95 % of the calls were faster.
    """

    median_ms: float
    p95_ms: float


def make_predict(
    model: "Model", *, batch_size: int = 512, mesh: Mesh | None = None, widths: Sequence[int] | None = None
) -> Callable[[dict, ArrayLike], np.ndarray]:
    """Makes a function that predicts any number of examples and compiles once.

    The last batch is filled up by repeating its last example, and what that adds is cut off.

    Args:
        model: The model.
        batch_size: Number of examples in a batch.
        mesh: Devices that hold the variables, over which each batch is divided; `None`: one device computes.
        widths: For inputs that are tokens `[N, ..., S]`, in rising order: sentences of like length are predicted
            together, cut to the narrowest of these that holds them, each of which is compiled.

    Returns:
        `(variables, inputs [N, ...]) -> logits [N, C]`, a float32 NumPy array; it raises `ValueError` if N is 0.

    Raises:
        ValueError: If the batch size is not positive.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model, images = from_linen(CNN(features=(4,), hidden=8)), np.zeros((5, 8, 8, 3), np.float32)
        >>> predict = evaluate.make_predict(model, batch_size=2)
        >>> predict(model.init(jax.random.key(0), images), images).shape
        (5, 10)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    forward = jax.jit(_forward(model)) if mesh is None else _divided(_forward(model), mesh)

    def predict(variables: dict, inputs: ArrayLike) -> np.ndarray:
        inputs = np.asarray(inputs)
        if not len(inputs):
            raise ValueError(f"there is nothing to predict: inputs have the shape {inputs.shape}")
        rows, predicted = [], []
        for chosen, batch in by_length(inputs, batch_size, widths):
            filled = np.pad(batch, [(0, batch_size - len(batch)), *[(0, 0)] * (batch.ndim - 1)], mode="edge")
            # One batch at a time: batches that are sent ahead of the computation would fill the device's memory.
            predicted.append(np.asarray(forward(variables, filled))[: len(batch)])
            rows.append(chosen)
        return np.concatenate(predicted)[np.argsort(np.concatenate(rows))]

    return predict


def classifier_score(predict: Callable[[dict, ArrayLike], np.ndarray]) -> Callable[[dict, Mapping[str, Any]], Score]:
    """Makes a function that scores a classifier.

    Args:
        predict: `(variables, inputs [N, ...]) -> logits [N, C]`, as `make_predict` makes it.

    Returns:
        `(variables, examples) -> Score`; the examples are `inputs` `[N, ...]` and `labels` `[N]`. Where a logit is NaN,
        both numbers are.
    """

    def score(variables: dict, examples: Mapping[str, Any]) -> Score:
        logits = predict(variables, examples["inputs"])
        if np.isnan(logits).any():
            return Score(float("nan"), float("nan"))
        loss = hard_cross_entropy(logits, examples["labels"])
        return Score(float(np.mean(loss)), accuracy(logits, examples["labels"]))

    return score


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose largest logit is at their label; of equal logits the first counts.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, integers in [0, C).

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes disagree, there is no example or a logit is NaN.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.accuracy([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]], [0, 1, 1])
        0.667
    """
    logits = _classified("logits", logits)
    return float(np.mean(logits.argmax(-1) == _labels_for(logits, labels)))


def accuracy_interval(correct: float, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share that was seen in a sample.

    (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n) with p = correct / n

    It stays within [0, 1] and, unlike p ± z standard errors, close to its nominal coverage when p is near 0 or 1.

    Args:
        correct: How many were right; need not be whole, say as a mean over seeds.
        total: How many there were, n.
        confidence: Probability that the interval is to cover, in (0, 1).

    Returns:
        Its lower and upper end, as fractions.

    Raises:
        ValueError: If `total` is not positive, or `correct` or `confidence` out of range.

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
    share, z = correct / total, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z**2 / (2 * total)
    reach = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    low, high = (centre - reach) / (1 + z**2 / total), (centre + reach) / (1 + z**2 / total)
    return max(low, 0.0), min(high, 1.0)  # only rounding leaves the range


def agreement(logits: ArrayLike, reference_logits: ArrayLike) -> float:
    """Share of examples on which two models choose the same class, right or wrong.

    Args:
        logits: `[N, C]`.
        reference_logits: The same shape, as from the teacher.

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
    logits, reference = _classified("logits", logits), _classified("reference_logits", reference_logits)
    if logits.shape != reference.shape:
        raise ValueError(f"logits {logits.shape} and reference_logits {reference.shape} must have one shape")
    return float(np.mean(logits.argmax(-1) == reference.argmax(-1)))


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, over bins of equal width.

    Σ_b (n_b / n) |accuracy_b − confidence_b|

    Bin b holds the examples whose largest probability is in ((b − 1) / bins, b / bins].

    Args:
        logits: `[N, C]`; probabilities are computed in float64.
        labels: `[N]`, integers in [0, C).
        bins: Number of bins.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes disagree, there is no example or bin, or a logit is NaN.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> evaluate.expected_calibration_error(np.log([[0.9, 0.1], [0.9, 0.1]]), [0, 1])
        0.4

    References:
        Guo et al., On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
    """
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}")
    logits = _classified("logits", logits).astype(np.float64)
    correct = logits.argmax(-1) == _labels_for(logits, labels)
    confidence = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    members = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1
    return float(np.abs(np.bincount(members, weights=correct - confidence)).sum() / len(logits))


def parameter_count(variables: dict) -> int:
    """Number of trained parameters; statistics do not count.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
        The number.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> evaluate.parameter_count({"params": {"kernel": np.zeros((3, 4))}, "batch_stats": {"mean": np.zeros(4)}})
        12
    """
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def parameter_bytes(variables: dict) -> int:
    """Memory of everything that a model needs in order to predict: parameters and statistics.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
        Bytes.

    Example:
        >>> import numpy as np
        >>> from jaxkd import evaluate
        >>> evaluate.parameter_bytes({"params": {"kernel": np.zeros((3, 4), np.float32)}, "batch_stats": {}})
        48
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def flops(model: "Model", variables: dict, inputs: ArrayLike) -> float | None:
    """Floating-point operations of the prediction of one example.

    XLA's count over the program as JAX hands it to the CPU backend, whatever the device in use: GPU compilers put
    convolutions into library calls, which count as nothing. A multiplication and an addition are two operations, one
    on each element is one; exponentials and their like, and products with padding, are left out.

    Args:
        model: The model.
        variables: Its variables; only shapes and dtypes matter.
        inputs: `[B, ...]`, likewise.

    Returns:
        The count, or `None` where JAX runs without its CPU backend, the backend does not count, or the program loops,
        as a recurrent network does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model, images = from_linen(CNN(features=(32, 64), hidden=64)), jnp.zeros((1, 32, 32, 3))
        >>> evaluate.flops(model, model.init(jax.random.key(0), images), images) / 1e6
        8.2
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    example = jax.ShapeDtypeStruct((1, *jnp.shape(inputs)[1:]), jnp.result_type(inputs))
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        lowered = jax.jit(_forward(model)).lower(shapes, example)
        counted = lowered.cost_analysis()
    if "stablehlo.while" in lowered.as_text():  # XLA counts one turn of a loop, however many there are
        return None
    return float(counted["flops"]) if counted and "flops" in counted else None


def latency(model: "Model", variables: dict, inputs: ArrayLike, *, repeats: int = 50, warmup: int = 5) -> Latency:
    """Wall time of predicting one batch that is on the device already.

    Each call is waited for before the next one starts, so that the time includes what it costs to launch it.

    Args:
        model: The model.
        variables: Its variables.
        inputs: `[B, ...]`, one batch.
        repeats: Number of calls that are timed.
        warmup: Number of calls before them; the first one compiles.

    Returns:
        Median and 95th percentile.

    Raises:
        ValueError: If `repeats` or `warmup` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model, images = from_linen(CNN(features=(4,), hidden=8)), jnp.zeros((1, 8, 8, 3))
        >>> time = evaluate.latency(model, model.init(jax.random.key(0), images), images, repeats=3)
        >>> 0 < time.median_ms <= time.p95_ms
        True
    """
    forward = jax.jit(_forward(model))
    variables, inputs = jax.device_put((variables, inputs))
    times = time_calls(lambda: forward(variables, inputs), repeats=repeats, warmup=warmup)
    return Latency(*(float(quantile) for quantile in np.percentile(times, [50, 95])))


def time_calls(call: Callable[[], Any], *, repeats: int, warmup: int = 1) -> np.ndarray:
    """Wall time of a call, each of which is waited for before the next one starts.

    Args:
        call: What to time.
        repeats: Number of calls that are timed.
        warmup: Number of calls before them; the first one compiles.

    Returns:
        Milliseconds `[repeats]`.

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


def measure(logits: ArrayLike, labels: ArrayLike, *, reference_logits: ArrayLike | None = None) -> dict[str, Any]:
    """What one seed's predictions are worth.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, integers in [0, C).
        reference_logits: The logits of the model to agree with, such as the teacher of this seed, `[N, C]`.

    Returns:
        `accuracy`, `ece` and `agreement`, as fractions; `agreement` is `None` without a reference.

    Raises:
        ValueError: If the shapes disagree, there is no example or a logit is NaN.

    Example:
        >>> from jaxkd import evaluate
        >>> evaluate.measure([[2.0, 1.0], [0.0, 3.0]], [0, 0])
        {'accuracy': 0.5, 'ece': 0.611, 'agreement': None}
    """
    return {
        "accuracy": accuracy(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "agreement": None if reference_logits is None else agreement(logits, reference_logits),
    }


def summarize(
    name: str,
    model: "Model",
    variables: Sequence[dict],
    logits: Sequence[ArrayLike],
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    seconds: Sequence[float],
    reference_logits: Sequence[ArrayLike] | None = None,
    throughput_batch: int = 256,
    repeats: int = 50,
) -> dict[str, Any]:
    """A model's row in the table of results, over its seeds.

    `accuracy_std` is the spread over seeds, the sample standard deviation. `accuracy_interval` covers the other source
    of chance, the drawing of the test set: it is Wilson's 95 % interval of the mean accuracy on N examples. Cost is
    measured with the first seed's variables.

    Args:
        name: The row's name.
        model: The model.
        variables: One tree per seed.
        logits: The predictions for `inputs`, one `[N, C]` per seed.
        inputs: The test examples `[N, ...]`.
        labels: `[N]`, integers in [0, C).
        seconds: Training time of each seed.
        reference_logits: What to agree with, one `[N, C]` per seed.
        throughput_batch: Size of the larger batch that is timed; at most N.
        repeats: Number of calls that are timed.

    Returns:
        Values that JSON can hold: `name`; `accuracy`, a list; `accuracy_mean`, `accuracy_std` (`None` for one seed)
        and `accuracy_interval`; `agreement` (`None` without a reference) and `ece`, means over seeds; `parameters`,
        `bytes`, `flops`; `latency_ms` and `latency_p95_ms` of one example; `throughput_batch`, its
        `throughput_latency_ms` and `throughput_latency_p95_ms`; `seconds`, a list.

    Raises:
        ValueError: If there is not one of each per seed, or shapes disagree.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd import evaluate
        >>> from jaxkd.models import CNN, from_linen
        >>> model, images = from_linen(CNN(features=(4,), hidden=8)), np.zeros((4, 8, 8, 3), np.float32)
        >>> variables, logits = model.init(jax.random.key(0), images), np.eye(4, 10)
        >>> row = evaluate.summarize("tiny", model, [variables], [logits], images, np.arange(4), seconds=[1.0])
        >>> row["accuracy"], row["accuracy_std"], row["parameters"]
        ([1.0], None, 498)
    """
    references = [None] * len(logits) if reference_logits is None else reference_logits
    counts = [len(variables), len(logits), len(references), len(seconds)]
    if not logits or len(set(counts)) > 1:
        raise ValueError(f"{name}: variables, logits, references and seconds must be one per seed, got {counts}")
    seeds = [measure(logits[i], labels, reference_logits=references[i]) for i in range(len(logits))]
    return {
        "name": name,
        **_over_seeds(seeds, np.size(labels)),
        "parameters": parameter_count(variables[0]),
        "bytes": parameter_bytes(variables[0]),
        "flops": flops(model, variables[0], inputs),
        **_timed(model, variables[0], inputs, throughput_batch, repeats),
        "seconds": [float(value) for value in seconds],
    }


def _over_seeds(seeds: Sequence[dict], total: int) -> dict[str, Any]:
    accuracies = [seed["accuracy"] for seed in seeds]
    agreements = [seed["agreement"] for seed in seeds]
    mean = float(np.mean(accuracies))
    return {
        "accuracy": accuracies,
        "accuracy_mean": mean,
        "accuracy_std": float(np.std(accuracies, ddof=1)) if len(seeds) > 1 else None,
        "accuracy_interval": list(accuracy_interval(mean * total, total)),
        "agreement": None if None in agreements else float(np.mean(agreements)),
        "ece": float(np.mean([seed["ece"] for seed in seeds])),
    }


def _timed(model: "Model", variables: dict, inputs: ArrayLike, batch: int, repeats: int) -> dict[str, Any]:
    inputs = np.asarray(inputs)[:batch]
    one = latency(model, variables, inputs[:1], repeats=repeats)
    many = latency(model, variables, inputs, repeats=repeats)
    return {
        "latency_ms": one.median_ms,
        "latency_p95_ms": one.p95_ms,
        "throughput_batch": len(inputs),
        "throughput_latency_ms": many.median_ms,
        "throughput_latency_p95_ms": many.p95_ms,
    }


def _forward(model: "Model") -> Callable[[dict, ArrayLike], Array]:
    return lambda variables, inputs: model.apply(variables, inputs, train=False)[0].logits.astype(jnp.float32)


def _divided(forward: Callable[[dict, Array], Array], mesh: Mesh) -> Callable[[dict, ArrayLike], Array]:
    """Computes a batch on all devices of a mesh; each gets all of the result."""

    def divided(variables: dict, inputs: Array) -> Array:
        parts = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return forward(variables, jax.lax.with_sharding_constraint(inputs, parts))

    return jax.jit(divided, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _classified(name: str, logits: ArrayLike) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"{name} must be [N, C] with at least one example, got the shape {logits.shape}")
    if np.isnan(logits).any():
        raise ValueError(f"{name} hold NaN, from which no class can be chosen: the model has diverged")
    return logits


def _labels_for(logits: np.ndarray, labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {labels.shape} must be one per row of the logits {logits.shape}")
    return labels
