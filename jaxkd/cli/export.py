"""The subcommand `jaxkd export`: the student of a run in the format of another program."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxkd.cli.errors import check_new, check_parent

SUFFIXES = {
    "onnx": ".onnx",
    "torch": ".torch.safetensors",
    "jaxexport": ".jaxexport",
    "safetensors": ".safetensors",
}

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Export the student of a run for another program.

onnx: for ONNX Runtime and others; needs pip install 'jaxkd-distill[onnx]'.

torch: safetensors with PyTorch's names and layouts, for the same network there.

jaxexport: a program that needs jax alone, with class names and tokenizer.

safetensors: weights with Flax's names, and the names of the classes.

Examples:
  python -m jaxkd export runs/mine --format onnx
  python -m jaxkd export runs/mine --format torch -o student.safetensors"""


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Options of `jaxkd export`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of a finished run, or of a student."""
    format: Literal["onnx", "torch", "jaxexport", "safetensors"]
    """What to write."""
    output: Annotated[
        Path | None,
        tyro.conf.arg(metavar="OUT", aliases=["-o"], help_behavior_hint="(default: student.*)"),
    ] = None
    """New file to write."""

    def execute(self) -> None:
        """Writes the file and says what it needs."""
        from jaxkd.cli.folders import note_unfinished

        output = self.output or Path(f"student{SUFFIXES[self.format]}")
        check_new(output)
        check_parent(output)
        if self.format in ("jaxexport", "safetensors"):
            self._copy(output)
        else:
            self._convert(output)
        note_unfinished(self.run)
        print(f"wrote {output}")

    def _copy(self, output: Path) -> None:
        from jaxkd.weights.students import check_files

        source = self.run / f"student{SUFFIXES[self.format]}"
        if not source.is_file():
            raise ValueError(f"{self.run} has no {source.name}: name the folder of a finished run")
        check_files(self.run)
        shutil.copyfile(source, output)

    def _convert(self, output: Path) -> None:
        import jax
        import numpy as np

        from jaxkd import weights

        if not (self.run / "student.json").is_file():
            raise ValueError(f"{self.run} has no student.json: name the folder of a finished run")
        model, variables, card = weights.load_network(self.run)
        if self.format == "torch":
            module = model.network.module if model.network else None
            if not hasattr(module, "torch_rules"):
                raise ValueError(f"{card.network} has no counterpart in PyTorch: choose onnx")
            weights.save_torch(output, variables, module.torch_rules())
            return
        weights.save_onnx(
            output,
            model,
            variables,
            jax.ShapeDtypeStruct(card.shape, np.dtype(card.dtype)),
            max_length=card.shape[0] if card.inputs == "texts" else None,
            class_names=card.class_names,
        )
