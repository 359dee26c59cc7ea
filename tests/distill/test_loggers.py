"""Loggers of a plan that is killed and resumed."""

import pytest

from jaxkd import distill, runs
from small_plans import VALIDATION, make_stage, soft_loss

PLAN = [make_stage("teacher"), make_stage("student", loss=soft_loss, teachers=("teacher",))]


@pytest.mark.thorough
@pytest.mark.parametrize("save_every", [0.0, 1e6])
def test_killed_plan_logs_each_record_once(tmp_path, save_every):
    logged = []

    def log_until_killed(record):
        logged.append(record)
        if len(logged) in (2, 6):
            raise SystemExit("killed")

    def train():
        run = runs.open_run(tmp_path, {}, loggers=(log_until_killed,))
        distill.run_plan(
            PLAN, [0, 1], run, validation=VALIDATION, evaluations=4, save_every=save_every
        )
        return run

    for _ in range(2):
        with pytest.raises(SystemExit):
            train()
    run = train()

    def sort(records):
        return sorted(records, key=lambda record: (record["stage"], record["seed"], record["step"]))

    assert len(logged) == 16
    assert sort(logged) == sort(run.metrics())
