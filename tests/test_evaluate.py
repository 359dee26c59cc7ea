import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import evaluate
from jaxkd.models import CNN, Model, Outputs, from_linen, with_input_normalization


@pytest.fixture(scope="module")
def small():
    model = with_input_normalization(from_linen(CNN(features=(4,), hidden=8)), [0.5] * 3, [0.2] * 3)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    return model, model.init(jax.random.key(0), images), images


def random_logits(seed, shape=(200, 10)):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def test_imports_stay_light():
    heavy = "flax matplotlib rich safetensors orbax.checkpoint tabulate".split()
    code = (
        "import sys; from jaxkd import evaluate, runs, weights; from jaxkd.runs import report; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stdout == "[]\n"


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_prediction_does_not_depend_on_the_batch_size(small, batch_size):
    model, variables, images = small
    outputs, _ = model.apply(variables, images, train=False)
    logits = evaluate.make_predict(model, batch_size=batch_size)(variables, images)
    assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-5, atol=1e-6)


def test_prediction_compiles_once_in_evaluation_mode_and_widens():
    modes = []

    def apply(variables, inputs, *, train, key=None):
        modes.append(train)
        return Outputs(inputs.astype(jnp.bfloat16) * variables["params"], {}), {}

    predict = evaluate.make_predict(Model(init=dict, apply=apply), batch_size=4)
    for total in (1, 4, 6, 8):
        inputs = np.arange(total * 3, dtype=np.float32).reshape(total, 3)
        logits = predict({"params": jnp.ones((), jnp.bfloat16)}, inputs)
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits, inputs)
    assert modes == [False]


def test_prediction_of_nothing_and_empty_batches_are_refused(small):
    model, variables, images = small
    with pytest.raises(ValueError, match=r"nothing to predict.*\(0, 8, 8, 3\)"):
        evaluate.make_predict(model)(variables, images[:0])
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        evaluate.make_predict(model, batch_size=0)


def test_accuracy_by_hand():
    logits = np.array([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0], [5.0, 5.0, 1.0]])
    assert evaluate.accuracy(logits, [1, 2, 2, 0]) == 0.75
    assert type(evaluate.accuracy(jnp.asarray(logits), jnp.array([1, 0, 2, 0]))) is float


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), [0, 1], r"labels \(2,\) must be one per row"),
        (np.zeros((3, 2)), [[0], [1], [1]], "must be one per row"),
        (np.zeros((0, 2)), [], "at least one example"),
        (np.zeros(3), [0, 1, 0], r"must be \[N, C\]"),
        ([[0.0, np.nan]], [0], "hold NaN"),
    ],
)
def test_bad_predictions_are_refused(logits, labels, message):
    for function in (evaluate.accuracy, evaluate.expected_calibration_error):
        with pytest.raises(ValueError, match=message):
            function(logits, labels)


# Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_equals_published_ones(correct, total, low, high):
    np.testing.assert_allclose(evaluate.accuracy_interval(correct, total), (low, high), atol=5e-5)
    mirrored = evaluate.accuracy_interval(total - correct, total)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=5e-5)


def test_interval_stays_in_range_and_widens_with_confidence():
    assert evaluate.accuracy_interval(0, 9)[0] == 0 and evaluate.accuracy_interval(9, 9)[1] == 1
    narrow = evaluate.accuracy_interval(8.5, 10, confidence=0.5)
    wide = evaluate.accuracy_interval(8.5, 10)
    assert wide[0] < narrow[0] < 0.85 < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("correct", "total", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)]
)
def test_interval_refuses_impossible_shares(correct, total, confidence):
    with pytest.raises(ValueError, match=f"correct={correct}, total={total}"):
        evaluate.accuracy_interval(correct, total, confidence=confidence)


def test_agreement_counts_equal_choices_right_or_wrong():
    first = random_logits(0)
    second = random_logits(1)
    assert evaluate.agreement(first, first + 3) == 1
    assert evaluate.agreement(first, second) == evaluate.agreement(second, first)
    reference = [[3.0, 0.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, 3.0], [9.0, 2.0, 1.0]]
    assert evaluate.agreement([[3.0, 0.0, 1.0]] * 4, reference) == 0.75
    with pytest.raises(ValueError, match="must have the same shape"):
        evaluate.agreement(first, second[:1])


def reference_calibration_error(logits, labels, bins):
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    confidence = probabilities.max(-1)
    correct = probabilities.argmax(-1) == labels
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_a_plain_loop(bins):
    logits = random_logits(2)
    labels = np.random.default_rng(3).integers(0, 10, 200)
    expected = reference_calibration_error(logits, labels, bins)
    assert evaluate.expected_calibration_error(logits, labels, bins=bins) == pytest.approx(
        expected, rel=1e-12
    )
    shifted = evaluate.expected_calibration_error(logits + 1, labels, bins=bins)
    assert shifted == pytest.approx(expected, rel=1e-4)


def test_calibration_bins_hold_their_right_edge():
    # Confidences 0.5, right, and 0.6, wrong: in two bins their mean gap is 0.55, in one bin 0.05.
    logits = np.log([[0.5, 0.5], [0.6, 0.4]])
    assert evaluate.expected_calibration_error(logits, [0, 1], bins=2) == pytest.approx(0.55)
    assert evaluate.expected_calibration_error(logits, [0, 1], bins=1) == pytest.approx(0.05)


def test_calibration_of_certainty_is_finite():
    assert evaluate.expected_calibration_error([[1e4, -np.inf], [-1e4, 0.0]], [0, 1]) == 0
    with pytest.raises(ValueError, match="bins must be a positive integer"):
        evaluate.expected_calibration_error([[1.0, 0.0]], [0], bins=0)


def test_size_counts_parameters_and_what_is_stored():
    params = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4, jnp.bfloat16)}}
    variables = {"params": params, "batch_stats": {"mean": np.zeros(4, np.float32)}}
    assert evaluate.parameter_count(variables) == 16
    assert evaluate.parameter_bytes(variables) == 12 * 4 + 4 * 2 + 4 * 4


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_near_the_hand_count(batch):
    model = with_input_normalization(
        from_linen(CNN(features=(32, 64), hidden=64)), [0.5] * 3, [0.2] * 3
    )
    images = np.zeros((batch, 32, 32, 3), np.uint8)
    macs = 30 * 30 * 32 * 27 + 13 * 13 * 64 * 288 + 2304 * 64 + 64 * 10
    variables = model.init(jax.random.key(0), images)
    assert 2 * macs < evaluate.flops(model, variables, images) < 1.03 * 2 * macs


def test_flops_are_none_where_they_are_not_counted(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
        assert evaluate.flops(*small) is None

    def absent(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(jax, "local_devices", absent)
    assert evaluate.flops(*small) is None


def test_flops_of_a_loop_are_not_counted():
    def apply(variables, inputs, *, train, key=None):
        logits, _ = jax.lax.scan(
            lambda x, _: (x @ variables["params"]["kernel"], None), inputs, length=7
        )
        return Outputs(logits, {}), {}

    model = Model(lambda key, inputs: {"params": {"kernel": jnp.eye(3)}, "batch_stats": {}}, apply)
    assert evaluate.flops(model, model.init(None, None), np.zeros((1, 3), np.float32)) is None


def test_latency_leaves_out_the_warmup_and_waits_for_each_call(small, monkeypatch):
    durations = [9.0, 8.0, 1.0, 2.0, 4.0]
    clock = iter(np.ravel([[0, duration] for duration in durations]) / 1000)
    block_until_ready = jax.block_until_ready
    waited = []

    def wait(result):
        waited.append(result.shape)
        return block_until_ready(result)

    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(jax, "block_until_ready", wait)
    time = evaluate.latency(*small, repeats=3, warmup=2)
    assert time.median_ms == pytest.approx(2) and time.p95_ms == pytest.approx(3.8)
    assert waited == [(7, 10)] * 5


@pytest.mark.parametrize("counts", [{"repeats": 0}, {"warmup": 0}])
def test_latency_needs_calls(small, counts):
    with pytest.raises(ValueError, match="must be positive"):
        evaluate.latency(*small, **counts)


def test_metrics_of_a_classifier():
    logits = random_logits(4)
    labels = np.random.default_rng(5).integers(0, 10, 200)
    metrics = evaluate.classification_metrics(logits, labels)
    assert metrics.accuracy == evaluate.accuracy(logits, labels)
    assert metrics.ece == evaluate.expected_calibration_error(logits, labels)
    assert metrics.agreement is None
    reference = random_logits(6)
    metrics = evaluate.classification_metrics(logits, labels, reference_logits=reference)
    assert metrics.agreement == evaluate.agreement(logits, reference)


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_labels_that_are_no_class_are_refused(label):
    """GLUE's test split has the label −1 everywhere, with which no prediction agrees."""
    logits = 9 * np.eye(3)
    labels = np.array([0, label, 2])
    message = rf"1 of 3 labels are {label}, which is not in \[0, 3\), the classes of the model"
    for metric in (evaluate.accuracy, evaluate.expected_calibration_error):
        with pytest.raises(ValueError, match=message):
            metric(logits, labels)
    score = evaluate.make_classifier_score(lambda variables, inputs: logits)
    with pytest.raises(ValueError, match=message):
        score({}, {"inputs": logits, "labels": labels})


def test_chance_is_the_share_of_the_commonest_class():
    assert evaluate.chance_accuracy(np.array([5, 5, 2, 5])) == 0.75
    with pytest.raises(ValueError, match="no label to count"):
        evaluate.chance_accuracy([])
    for wrong in (np.eye(3, dtype=int), np.array([0.0, 1.0]), np.array(3)):
        with pytest.raises(ValueError, match=r"labels must be integers \[N\], got .* one-hot"):
            evaluate.chance_accuracy(wrong)


def test_metrics_warn_of_probabilities():
    probabilities = np.exp(random_logits(4))
    probabilities /= probabilities.sum(-1, keepdims=True)
    labels = np.zeros(len(probabilities), int)
    for metric in (evaluate.expected_calibration_error, evaluate.classification_metrics):
        with pytest.warns(UserWarning, match="are probabilities, each row sums to 1: return"):
            metric(probabilities, labels)
        metric(np.log(probabilities), labels)


def test_metrics_warn_of_the_outputs_of_a_sigmoid():
    logits = random_logits(4)
    labels = np.zeros(len(logits), int)
    outputs = 1 / (1 + np.exp(-logits))
    score = evaluate.make_classifier_score(lambda variables, inputs: inputs)
    for metric in (evaluate.expected_calibration_error, evaluate.classification_metrics):
        with pytest.warns(UserWarning, match="between 0 and 1, as a sigmoid gives them: return"):
            metric(outputs, labels)
    with pytest.warns(UserWarning, match="as a sigmoid gives them"):
        score({}, {"inputs": outputs, "labels": labels})
    # Neither those of a network that has learnt nothing nor the logits themselves.
    score({}, {"inputs": np.zeros_like(logits), "labels": labels})
    score({}, {"inputs": np.full_like(logits, 0.5), "labels": labels})
    score({}, {"inputs": logits, "labels": labels})


@pytest.mark.parametrize("row", [[np.inf, 0.0], [-np.inf, -np.inf], [np.inf, -np.inf]])
def test_infinite_confidence_raises(row):
    with pytest.raises(ValueError, match="largest logit of 1 of 2 examples is infinite, .* clip"):
        evaluate.expected_calibration_error([row, [0.0, 1.0]], [0, 1])
    # A class that is ruled out has probability 0.
    assert evaluate.expected_calibration_error([[0.0, -np.inf], [-np.inf, 1.0]], [0, 1]) == 0


def test_bins_are_a_positive_integer():
    for bins in (0, 2.5):
        with pytest.raises(ValueError, match=f"bins must be a positive integer, got {bins}"):
            evaluate.expected_calibration_error([[1.0, 0.0]], [0], bins=bins)


def test_one_logit_has_no_classes():
    logits, labels = np.array([[2.3], [-1.0]]), np.array([0, 0])
    with pytest.raises(ValueError, match=r"logits \(2, 1\): one logit per example has no classes"):
        evaluate.accuracy(logits, labels)
    assert evaluate.accuracy(np.concatenate([0 * logits, logits], 1), labels) == 0.5


def test_inputs_of_a_dict_have_one_length():
    def apply(variables, inputs, *, train, key=None):
        return Outputs(inputs["a"] + inputs["b"], {}), {}

    predict = evaluate.make_predict(Model(lambda key, inputs: {}, apply), batch_size=4)
    inputs = {"a": np.ones((6, 2), np.float32), "b": np.ones((5, 2), np.float32)}
    with pytest.raises(ValueError, match="their lengths differ: a has 6, b has 5"):
        predict({}, inputs)
    assert predict({}, inputs | {"a": inputs["b"]}).shape == (5, 2)


@pytest.mark.parametrize("params", [{"dense": {"kernel": np.ones((2, 3))}}, {}, np.ones(3)])
def test_parameters_without_their_level_raise(params):
    with pytest.raises(ValueError, match=r"expected variables .*: pass \{'params': params"):
        evaluate.parameter_count(params)
