"""The scores of models on the validation split, and how far students are from their teachers."""

import collections
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkd import losses
from jaxkd._messages import list_some, shorten
from jaxkd.distill import _diagnosis
from jaxkd.distill.plan import Entry, Stage
from jaxkd.distill.selection import LARGEST
from jaxkd.evaluate import PredictFn, Score, ScoreFn, agreement, score_logits
from jaxkd.models.model import Model
from jaxkd.runs import RunError

MakeScore = Callable[[Model], ScoreFn]
"""`model -> ((variables, examples) -> Score or numbers by name)`."""

MAX_CACHED_TEACHERS = 64
"""Number of teachers whose logits on the validation split stay in memory."""
HUGE_GROWTH, HUGE_LOSS = 1e6, 1e12
"""Growth since the last evaluation, and size, of a training loss that are a divergence."""


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        scores: `loss` and `accuracy`, or the numbers that the user's own score returns, by name.
        teachers: By the name of each teacher of the same classes, the mean divergence `kl` from it
            at temperature 1, and the share of examples with the same prediction, `agreement`.
    """

    scores: dict[str, float]
    teachers: dict[str, dict[str, float]]


class Validator:
    """Evaluates the models of a plan on the validation split."""

    def __init__(
        self,
        plan: Sequence[Entry],
        predict_fns: Mapping[str, PredictFn],
        validation: Mapping[str, Any],
        make_score: MakeScore | None,
    ) -> None:
        """Takes the plan, the predict functions by name, the split and the user's own score.

        Raises:
            TypeError: If `make_score` does not take a model and return a function.
            ValueError: If a stage returns the best by a score that there is not.
        """
        self.examples = validation
        self.is_of_classes = make_score is None
        self._predict_fns = predict_fns
        self._models = {entry.name: entry.model for entry in plan}
        # Made now, so that an error in it does not come after hours of training.
        models = () if make_score is None else {*self._models.values()}
        self._scores = make_scores(make_score, models)
        for entry in plan:
            if self.is_of_classes and isinstance(entry, Stage) and entry.best is not None:
                entry.best.read(Score(0.0, 0.0)._asdict(), f"stage {shorten(entry.name, 40)!r}")
        self._teacher_logits: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def score(self, name: str, variables: dict) -> dict[str, float]:
        """Returns the scores of a model by name.

        Raises:
            TypeError: If the user's own score returns anything but numbers by name.
        """
        if self.is_of_classes:
            return score_logits(self._predict(name, variables), self.examples["labels"])._asdict()
        return check_scores(self._scores[self._models[name]](variables, self.examples))

    def evaluate(self, name: str, variables: dict, teachers: Mapping[str, dict]) -> Evaluation:
        """Returns the scores of a student, and how far it is from its teachers.

        Args:
            name: Name of the student.
            variables: Its variables.
            teachers: The variables of its teachers by name.
        """
        if not self.is_of_classes:
            return Evaluation(self.score(name, variables), {})
        logits = self._predict(name, variables)
        scores = score_logits(logits, self.examples["labels"])._asdict()
        compared = {}
        for teacher, teacher_variables in teachers.items():
            teacher_logits = self._predict_teacher(teacher, teacher_variables)
            if teacher_logits is not None and _are_comparable(logits, teacher_logits):
                compared[teacher] = {
                    "kl": _mean_divergence(logits, teacher_logits),
                    "agreement": agreement(logits, teacher_logits),
                }
        return Evaluation(scores, compared)

    def _predict(self, name: str, variables: dict) -> np.ndarray:
        return self._predict_fns[name](variables, self.examples["inputs"])

    def _predict_teacher(self, name: str, variables: dict) -> np.ndarray | None:
        """Returns a teacher's logits; `None` if it has other classes than the split."""
        if _diagnosis.has_unknown_labels(self._models[name], self.examples):
            return None
        # By identity, with the variables beside the logits, so that no other object gets their id.
        key = name, id(variables)
        if key not in self._teacher_logits:
            self._teacher_logits[key] = variables, self._predict(name, variables)
            if len(self._teacher_logits) > MAX_CACHED_TEACHERS:
                self._teacher_logits.popitem(last=False)
        return self._teacher_logits[key][1]


def make_scores(make_score: MakeScore | None, models: Iterable[Model]) -> dict[Model, ScoreFn]:
    """Returns the user's own score of each model.

    Raises:
        TypeError: If `make_score` does not take a model and return a function.
    """
    scores = {}
    if make_score is not None:
        check_make_score(make_score)
        scores = {model: make_score(model) for model in models}
    for score in scores.values():
        if not callable(score):
            raise TypeError(
                f"make_score returned {shorten(repr(score), 60)}, not the function "
                "(variables, examples) -> scores"
            )
    return scores


def check_make_score(make_score: Any) -> None:
    """Raises `TypeError` unless a function takes a model alone."""
    try:
        inspect.signature(make_score).bind(None)
    except TypeError as error:
        raise TypeError(
            "make_score must be a function of a model that returns the function "
            f"(variables, examples) -> scores, got {shorten(repr(make_score), 80)} "
            f"({shorten(error, 60)})"
        ) from error
    except ValueError:  # a builtin without a signature
        pass


def check_scores(scores: Any) -> dict[str, float]:
    """Returns what a user's own score returned as numbers by name.

    Raises:
        TypeError: If it is neither a `Score` nor a dict of numbers.
    """
    if isinstance(scores, Score):
        scores = scores._asdict()
    if not isinstance(scores, Mapping) or not scores:
        raise TypeError(
            "a score must return a Score or a dict such as {'loss': 0.2, 'rmse': 0.4}, got "
            f"{shorten(repr(scores), 80)}"
        )
    numbers_by_name = {}
    for name, value in scores.items():
        # Text has no dimension either. JAX's own dtypes have another kind than NumPy's numbers.
        is_scalar = np.ndim(value) == 0 and hasattr(value, "dtype")
        is_number = isinstance(value, numbers.Real) or (
            is_scalar and value.dtype.kind not in "OSUMmc"
        )
        if not isinstance(name, str) or not name or not is_number:
            raise TypeError(
                f"a score must return numbers by name, got {shorten(repr(value), 60)} as "
                f"{shorten(repr(name), 60)}"
            )
        numbers_by_name[name] = float(value)
    return numbers_by_name


def describe_scores(scores: Mapping[str, float]) -> str:
    """Returns scores as text, such as "86.4% on validation"."""
    if "accuracy" in scores:
        return f"{scores['accuracy']:.1%} on validation"
    return list_some(f"{name} {value:.4g}" for name, value in scores.items()) + " on validation"


def check_evaluation(
    evaluation: Evaluation,
    label: str,
    step: int,
    variables: Any,
    training_losses: np.ndarray,
    examples: Mapping[str, Any],
) -> None:
    """Raises `RunError` with the first score that is not finite, and its cause."""
    for name, value in evaluation.scores.items():
        if np.isfinite(value):
            continue
        message = f"{label}: the validation {shorten(name, 40)} is {value} after step {step}, "
        if np.isfinite(evaluation.scores.get("loss", np.nan)):
            raise RunError(
                f"{message}although the loss is finite: return a dict without it from the score if "
                "the model has no such number"
            )
        if name not in LARGEST and not _diagnosis.count_not_finite(variables):
            raise RunError(
                f"{message}although all weights are finite: correct the score, or return a dict "
                "without it where it is not defined"
            )
        raise RunError(message + _find_cause(variables, training_losses, examples))


def _find_cause(variables: Any, training_losses: np.ndarray, examples: Mapping[str, Any]) -> str:
    """Describes why a validation score is not finite, although the training losses are."""
    remedy = "training has diverged; try a smaller learning rate"
    if count := _diagnosis.count_not_finite(variables):
        return f"since {count:,} weights are NaN or infinite, and {remedy}"
    loss = float(np.mean(training_losses))
    if cause := _diagnosis.find_cause(examples, {}, {}):
        return f"since in the validation split {cause}"
    if abs(loss) > min(HUGE_GROWTH * abs(float(training_losses[0])), HUGE_LOSS):
        return f"the training loss is {loss:.3g}, and {remedy}"
    message = f"while the training loss ({loss:.3g}) and all weights are finite"
    inputs = examples.get("inputs")
    if len(_diagnosis.find_extreme_tokens(inputs)):
        tokens = _diagnosis.describe_tokens(inputs)
        return f"{message}: in the validation split, look for unknown ones among {tokens}"
    return (
        f"{message}, and so is the validation split: {remedy}, or find out why the model gives NaN "
        "with train=False"
    )


def _are_comparable(logits: np.ndarray, teacher_logits: np.ndarray) -> bool:
    is_finite = np.isfinite(logits).all() and np.isfinite(teacher_logits).all()
    return logits.ndim == 2 and logits.shape == teacher_logits.shape and bool(is_finite)


def _mean_divergence(logits: np.ndarray, teacher_logits: np.ndarray) -> float:
    return float(np.mean(losses.kl_divergence(logits, teacher_logits, temperature=1.0)))
