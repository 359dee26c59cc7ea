"""The queue of measurements, the most useful first."""

from experiments.benchmarks.accelerator import (
    epochs,
    fused,
    kd_rows,
    resume,
    smoke,
    steps,
    students,
)
from experiments.benchmarks.accelerator.measurement import Measurement

QUEUE = (
    Measurement("smoke", smoke.measure, smoke.Options(), smoke.TINY, 2.5),
    Measurement(
        "smoke_deterministic",
        smoke.measure,
        smoke.Options(precisions=(smoke.EXACT,)),
        smoke.TINY._replace(precisions=(smoke.EXACT,)),
        2.0,
        deterministic=True,
    ),
    *(
        Measurement(
            f"steps_{dtype}",
            steps.measure,
            steps.Options(bf16=dtype == "bfloat16"),
            steps.tiny(bf16=dtype == "bfloat16"),
            5.0,
        )
        for dtype in ("float32", "bfloat16")
    ),
    Measurement("students", students.measure, students.Options(), students.TINY, 2.5),
    Measurement("fused_losses", fused.measure, fused.Options(), fused.TINY, 3.0),
    Measurement(
        "cifar10_30_epochs", epochs.measure, epochs.Options(), epochs.TINY, 4.0, needs_pack=True
    ),
    Measurement("resume", resume.measure, resume.Options(), resume.TINY, 2.0, deterministic=True),
    *(
        Measurement(
            "labels" if method == kd_rows.LABELS else f"kd_rows_{method}",
            kd_rows.measure,
            kd_rows.Options(method),
            kd_rows.tiny(method),
            6.0,
            needs_pack=True,
        )
        for method in (kd_rows.LABELS, *kd_rows.METHODS)
    ),
)
