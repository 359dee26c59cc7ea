"""Stages, losses and results that experiments share."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from experiments.common.cli import check_writable
from experiments.common.options import Options, SoftTargetOptions, make_placement
from jaxkd import distill, models, runs
from jaxkd.cli.folders import choose_folder
from jaxkd.cli.limits import expand
from jaxkd.distill import Examples, LossFn, methods
from jaxkd.transfer import Rule, transfer

Plan = Sequence[distill.Stage | distill.Pretrained]
"""Stages and pretrained models."""


def make_stage(
    name: str,
    model: models.Model,
    examples: Examples,
    loss: LossFn,
    options: Options,
    *,
    steps: int,
    **kwargs: Any,
) -> distill.Stage:
    """Makes a stage with the options' optimizer and batch size.

    Args:
        name: Name of the stage.
        model: The student.
        examples: Its examples.
        loss: Its loss.
        options: The options.
        steps: Number of training steps.
        **kwargs: Further attributes of the stage, or others in place of the options'.
    """
    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps))
    defaults: dict[str, Any] = {"tx": tx, "batch_size": options.batch_size}
    return distill.Stage(name, model, examples, loss, steps=steps, **defaults | kwargs)


def make_soft_target_loss(options: SoftTargetOptions) -> LossFn:
    """Makes the loss of a student with one teacher and the options' temperature and alpha."""
    return methods.make_soft_target_loss(temperature=options.temperature, alpha=options.alpha)


def transfer_all_but_head(source: dict, fresh: dict) -> dict:
    """Returns the weights of another network, with the last layer of a fresh one."""
    # The two data sets may have different numbers of classes.
    rules = (Rule("params/logits/{rest...}", None),)
    return transfer(source, fresh, rules=rules, strict=False)[0]


def open_run(
    experiment: str,
    options: Options,
    data_name: str,
    arrays: Iterable[np.ndarray],
    *,
    sources: Mapping[str, Any] | None = None,
) -> runs.Run:
    """Starts the run of an experiment, resumes it, or lets it grow by other options.

    Args:
        experiment: Name of the script.
        options: Its options.
        data_name: Name of the data set.
        arrays: All of the data, for its fingerprint.
        sources: What the configuration records of files that were downloaded.
    """
    config = {"experiment": experiment} | dataclasses.asdict(options) | dict(sources or {})
    if options.teacher_cache and distill.is_primary_process():
        # Otherwise it would fail after the teacher's training.
        check_writable("--teacher-cache", expand(options.teacher_cache))
    return runs.open_run(
        choose_folder(experiment, options, data_name),
        config,
        arrays=arrays,
        # Other options only meet in a folder that the user names.
        grow=bool(options.workdir),
    )


def run_options(options: Options, plan: Plan) -> dict[str, Any]:
    """Returns the arguments of `distill.run_plan` that follow from the options."""
    return {
        "seeds": range(options.seed, options.seed + options.num_seeds),
        "placement": make_placement(options, plan),
        "save_every": options.save_every,
        "evaluations": options.evaluations,
        "teacher_cache": options.teacher_cache and expand(options.teacher_cache),
    }
