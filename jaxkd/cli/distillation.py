"""The plan of `jaxkd distill`: its data, teacher, students and stages, as its options say."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxkd import data, distill, models, runs
from jaxkd.cli.distill_options import DistillOptions
from jaxkd.cli.errors import option_name, require
from jaxkd.cli.image_problem import ImageProblem
from jaxkd.cli.limits import LARGEST_INTEGER
from jaxkd.cli.problem import Problem, Teacher, make_stage
from jaxkd.cli.text_problem import TextProblem
from jaxkd.data import text
from jaxkd.distill import methods


def load_problem(options: DistillOptions) -> Problem:
    """Loads the data, as images or as texts.

    Raises:
        ValueError: If there is no such data, or it does not fit the options.
    """
    is_text = options.kind == "texts"
    if options.kind == "auto":
        is_text = text.is_text_source(options.data, options.data_dir)
    if not is_text:
        has_statistics = bool(options.teacher_mean)
        for name in ("text_column", "label_column", "max_length"):
            require(getattr(options, name) is None, f"{option_name(name)} is for texts, not images")
        dataset = data.load(
            options.data,
            options.data_dir,
            image_size=options.image_size,
            stream=options.stream or None,
        )
        return ImageProblem(
            dataset,
            augment=options.augment,
            mix=None if options.mix == "none" else getattr(data, options.mix),
            statistics=(options.teacher_mean, options.teacher_std) if has_statistics else None,
        )
    for name in ("image_size", "stream", "augment", "teacher_mean"):
        require(not getattr(options, name), f"{option_name(name)} is for images, not texts")
    require(options.mix == "none", "--mix is for images, not texts")
    texts = text.load_texts(
        options.data,
        options.data_dir,
        text_column=options.text_column,
        label_column=options.label_column,
    )
    return TextProblem(texts, options.teacher, max_length=options.max_length)


def make_plan(
    options: DistillOptions, problem: Problem, teacher: Teacher
) -> list[distill.Stage | distill.Pretrained]:
    """Makes the plan: teacher, assistant if there is one, and students.

    Args:
        options: The options.
        problem: The data.
        teacher: The teacher, after its fine-tuning if there is any.

    Raises:
        ValueError: If a network or a method does not exist, or does not fit the data.
    """
    student = problem.make_student(options.student, option="--student")
    labelled: Any = problem.train
    partly: Any = problem.train
    if options.num_labels is not None:
        labelled, partly = data.few_labels(problem.train, options.num_labels)
    stage = _stage_maker(options, problem)
    plan: list[Any] = [
        stage("teacher", teacher.model, problem.train, methods.supervised_loss)
        if teacher.variables is None
        else distill.Pretrained("teacher", teacher.model, teacher.variables)
    ]
    plan.append(
        stage("student_alone", student.model, labelled, methods.supervised_loss, **student.start)
    )
    sources = [("teacher", teacher.model, "")]
    if options.assistant is not None:
        assistant = problem.make_student(options.assistant, option="--assistant")
        loss = methods.make_soft_target_loss(temperature=options.temperature, alpha=options.alpha)
        plan.append(
            stage(
                "assistant", assistant.model, partly, loss, teachers=("teacher",), **assistant.start
            )
        )
        sources.append(("assistant", assistant.model, "_assisted"))
    for source, source_model, suffix in sources:
        for method in options.method:
            loss, init_loss = _make_loss(options, problem, method, student.model, source_model)
            plan.append(
                stage(
                    f"student_{method}{suffix}",
                    student.model,
                    partly,
                    loss,
                    teachers=(source,),
                    init_loss=init_loss,
                    # A cache has no features.
                    cache_teachers=method in methods.LOGIT_METHODS and problem.augment is None,
                    **student.start,
                )
            )
    return plan


def fine_tune(
    options: DistillOptions, problem: Problem, teacher: Teacher, run: runs.Run
) -> distill.TrainedModel:
    """Fine-tunes a pretrained teacher on the data, once for all seeds."""
    more = dict(teacher.fine_tuning or {})
    steps = _count_steps(options, problem, more.pop("epochs", None))
    if make_optimizer := more.pop("make_optimizer", None):
        more["tx"] = make_optimizer(steps)
    stage = _stage_maker(options, problem)(
        "teacher",
        teacher.model,
        problem.train,
        methods.supervised_loss,
        start="pretrained",
        steps=steps,
        **more,
    )
    plan = [distill.Pretrained("pretrained", teacher.model, dict(teacher.variables or {})), stage]
    trained = distill.run_plan(plan, [options.seed], run, **run_options(options, problem))
    return trained["teacher"][0]


def run_options(options: DistillOptions, problem: Problem) -> dict[str, Any]:
    """Returns the arguments of `distill.run_plan` that follow from the options."""
    return {
        "validation": problem.validation,
        "buckets": problem.buckets,
        "evaluations": options.evaluations,
        "save_every": options.save_every,
    }


def _stage_maker(options: DistillOptions, problem: Problem) -> Callable[..., Any]:
    """Returns a function that makes a stage with the options' optimizer, steps and batches."""
    steps = _count_steps(options, problem)
    learning_rate = options.learning_rate or problem.defaults.learning_rate
    defaults = {
        "tx": problem.make_optimizer(learning_rate, steps),
        "steps": steps,
        "batch_size": options.batch_size or problem.defaults.batch_size,
        "ema_decay": options.ema_decay,
        "best": None
        if options.best == "none"
        else distill.Best(options.best, patience=options.patience),
    }

    def make(name: str, model: Any, examples: Any, loss: Any, **more: Any) -> Any:
        return make_stage(problem, name, model, examples, loss, **defaults | more)

    return make


def _make_loss(
    options: DistillOptions,
    problem: Problem,
    name: str,
    student: models.Model,
    teacher: models.Model,
) -> tuple[Any, Any]:
    """Makes the loss of a method, and what draws its parameters, if it has any."""
    if name == "kd":
        loss = methods.make_soft_target_loss(temperature=options.temperature, alpha=options.alpha)
        return loss, None
    if options.num_labels is not None and name in methods.LABEL_METHODS:
        raise ValueError(
            f"--method {name} reads every label: leave out --num-labels, or choose another method, "
            "such as kd"
        )
    if options.mix != "none" and name in methods.LABEL_METHODS:
        raise ValueError(
            f"--method {name} reads one label of each image: leave out --mix, or choose another "
            "method, such as kd"
        )
    outputs = [problem.infer_outputs(model) for model in (student, teacher)]
    try:
        method = methods.make_method(name, *outputs, temperature=options.temperature)
    except ValueError as error:
        raise ValueError(f"--method {name[:40]}: {error}") from error
    return methods.make_loss(method), method.init


def choose_comparisons(students: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each distilled student with the one without teacher, or with the direct one."""
    pairs = []
    for name in students[1:]:
        direct = name.removesuffix("_assisted")
        pairs.append((name, "student_alone" if direct == name else direct))
    return pairs


def _count_steps(options: DistillOptions, problem: Problem, epochs: int | None = None) -> int:
    """Returns the number of steps of `epochs`, or of the options' epochs."""
    epochs = epochs or options.epochs or problem.defaults.epochs
    batch_size = options.batch_size or problem.defaults.batch_size
    # In integers, because a float cannot hold a large product.
    steps = -(-epochs * len(problem.train["labels"]) // batch_size)
    require(steps <= LARGEST_INTEGER, f"--epochs {epochs}: too many steps, {steps:,}")
    return steps
