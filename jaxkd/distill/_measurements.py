"""Rows of results that were measured before, which are read instead of measured again."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxkd._messages import first_line
from jaxkd.distill._cached_outputs import count_bytes, describe_size
from jaxkd.distill._identity import fingerprint_tree, hash_json, without_commit
from jaxkd.distill._lowering import cached_outputs_shape, hash_predict, variables_shape
from jaxkd.distill._stage_run import TrainedModel
from jaxkd.distill.distributed import is_primary_process
from jaxkd.distill.plan import Entry, Stage, input_shapes
from jaxkd.runs import IGNORED_OPTIONS, ResultRow, Run, RunError
from jaxkd.runs.environment import describe_environment


def digest_measurements(
    plan: Sequence[Entry],
    models: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    reference: str,
    settings: Any,
    run: Run,
) -> dict[str, str]:
    """Returns a digest by name of all that a row of results depends on.

    Args:
        plan: The stages and pretrained models.
        models: Their trained models, one per seed or one for all.
        test: `inputs` and `labels`.
        reference: Name of the model with which agreement is measured.
        settings: JSON values that say how it is measured.
        run: The run, of which the configuration counts for what the other values do not show, such
            as functions that a model calls on the host.
    """
    config = {name: value for name, value in run.config.items() if name not in IGNORED_OPTIONS}
    # Latencies are those of this machine and these versions.
    environment = without_commit(describe_environment())
    data = fingerprint_tree({name: test[name] for name in ("inputs", "labels")})
    common = [data, settings, config, environment]
    example = input_shapes(test["inputs"])
    digests = {
        entry.name: [
            hash_predict(entry, example),
            [fingerprint_tree(model.variables) for model in models[entry.name]],
        ]
        for entry in plan
    }
    return {
        name: hash_json([name, digest, name != reference and digests[reference], common])
        for name, digest in digests.items()
    }


def describe_caches(entry: Entry, plan: Sequence[Entry]) -> tuple[str, ...]:
    """Returns a line on the size of each teacher's cached outputs that a stage learns from.

    Stages whose data are a function of the seed are passed over.
    """
    if not isinstance(entry, Stage) or not entry.cache_teachers or callable(entry.data):
        return ()
    teachers = {other.name: other for other in plan if other.name in entry.teachers}
    inputs = entry.examples(0)["inputs"]
    shape, lines = input_shapes(inputs), []
    for name, teacher in teachers.items():
        outputs = cached_outputs_shape(entry, teacher, variables_shape(teacher, shape), shape)
        size = count_bytes(outputs)
        lines.append(describe_size(name, size, size * len(inputs)))
    return tuple(lines)


def find_measured(run: Run, digests: Mapping[str, str]) -> dict[str, ResultRow]:
    """Returns the rows of `results.json` that have these digests, by name.

    Damaged results are measured again, with a warning.
    """
    if not is_primary_process():  # which alone writes them
        return {}
    try:
        rows = run.read_results()
    except FileNotFoundError:
        return {}
    except RunError as error:
        warnings.warn(f"all models are measured again: {first_line(error)}", stacklevel=3)
        return {}
    return {row.name: row for row in rows if row.measured and row.measured == digests.get(row.name)}
