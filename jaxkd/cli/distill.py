"""The subcommand `jaxkd distill`: a teacher, a student and what the student learns from it."""

import dataclasses
import warnings
from pathlib import Path

from jaxkd.cli.distill_options import DistillOptions
from jaxkd.cli.errors import show_warning

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Distil a teacher into a student on your images or texts.

--data is fashion_mnist_mini, a TFDS name, a folder with train/CLASS/ and test/CLASS/,

a folder with train.tsv and test.tsv, each line a text, a tab and a class,

such files of Hugging Face's datasets, .parquet or .arrow,

or one such table, reviews.csv, of which a test set is held out.

It trains a student on labels alone and one with each --method, and compares them.

The same command resumes a stopped run. The best student is in the run's folder.

A network is a name of jaxkd.models, with keywords in quotes if any.

Examples:
  python -m jaxkd distill --data photos --image-size 64 --augment
  python -m jaxkd distill --data fashion_mnist_mini --num-labels 500
  python -m jaxkd distill --data cifar10 --teacher resnet56:resnet56.th \\
      --student resnet20 --method kd dkd dist --num-seeds 5
  python -m jaxkd distill --data photos --teacher runs/large \\
      --student 'CNN(features=(16, 32), hidden=32)'
  python -m jaxkd distill --data reviews --teacher path/to/bert
  python -m jaxkd distill --data reviews --teacher hub:owner/name@revision"""


@dataclasses.dataclass(frozen=True)
class DistillCommand(DistillOptions):
    """Options of `jaxkd distill`."""

    def execute(self) -> None:
        """Trains teacher and students, compares them and saves the best student."""
        self.check()
        from jaxkd import distill, runs
        from jaxkd.cli import distillation, loggers, start
        from jaxkd.cli.folders import choose_folder

        loggers.check_installed(self.log)
        start.print_any_text()
        start.keep_freed_memory()
        start.keep_compiled_programs()
        if self.deterministic:
            runs.enable_determinism()
        warnings.showwarning = show_warning
        problem = distillation.load_problem(self)
        options = self
        if self.student == "auto":
            options = dataclasses.replace(self, student=problem.default_student)
            print(f"the student is {options.student}")
        teacher = problem.make_teacher(self.teacher)
        # Before the teacher is fine-tuned, so that an unknown network or method is found now.
        plan = distillation.make_plan(options, problem, teacher)
        config = {"command": "distill"} | dataclasses.asdict(self) | problem.sources
        folder = choose_folder("distill", self, self.data)
        # Other options only meet in a folder that the user names.
        grow = bool(self.workdir)
        run = runs.open_run(
            folder,
            config,
            arrays=problem.arrays,
            grow=grow,
            loggers=loggers.make_loggers(self.log, folder, config),
        )
        fine_tuned = None
        if teacher.fine_tuning is not None:
            fine_tuned = distillation.fine_tune(options, problem, teacher, run)
            teacher = teacher._replace(variables=fine_tuned.variables)
            plan = distillation.make_plan(options, problem, teacher)
        seeds = range(self.seed, self.seed + self.num_seeds)
        trained = distill.run_plan(plan, seeds, run, **distillation.run_options(options, problem))
        run.close_loggers()
        if fine_tuned is not None:
            # In place of the plan's pretrained one, which has no training time.
            trained = {**trained, "teacher": [fine_tuned]}
        students = [entry.name for entry in plan if entry.name.startswith("student")]
        distill.save_results(
            run,
            plan,
            trained,
            problem.test,
            title=f"Distillation on {Path(self.data).name}",
            class_names=problem.class_names,
            students=students,
            comparisons=distillation.choose_comparisons(students),
            buckets=problem.buckets,
            **problem.saving,
        )
        print(f"Classify files with it: jaxkd predict {run.folder} FILES")
