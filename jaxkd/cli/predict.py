"""The subcommand `jaxkd predict`: classes and probabilities of images or texts."""

import csv
import dataclasses
import io
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from jaxkd._messages import list_some, shorten
from jaxkd.cli.errors import check_new, check_parent, exit_with, print_warning, show_warning

if TYPE_CHECKING:
    import numpy as np

    from jaxkd.data.image_folder import Picture
    from jaxkd.weights import Student

_CHUNK = 1024
"""Number of images in memory at once."""
MAX_STDIN = 2**28
"""Largest number of characters that standard input may have."""
_MAX_SHOWN = 60
"""Number of characters of a text in the table."""

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Predict the classes of images or lines of text with a student.

STUDENT is the folder of a finished run, or a student.jaxexport file.

FILES are images, folders of images, text files (a text a line), .npy arrays,

tables of texts (.csv, .tsv, .jsonl, .parquet), or - for stdin, a text a line.

Files that cannot be read are named, the others are predicted; the status is 1 then.

Examples:
  python -m jaxkd predict runs/mine photo.jpg more_photos/
  python -m jaxkd predict student.jaxexport reviews.txt --top 2 --csv -o classes.csv
  python -m jaxkd predict runs/mine reviews.jsonl --text-column body
  echo "a good film" | python -m jaxkd predict runs/mine - --json"""


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Options of `jaxkd predict`."""

    student: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="STUDENT")]]
    """Folder of a run or a student, or a .jaxexport file."""
    files: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")]]
    """What to predict."""
    top: Annotated[int, tyro.conf.arg(metavar="K")] = 1
    """Number of classes to show, the most probable first."""
    json: bool = False
    """Print a JSON list."""
    csv: bool = False
    """Print comma-separated values."""
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="OUT", aliases=["-o"], help_behavior_hint="(default: standard output)"
        ),
    ] = None
    """New file to write."""
    class_names: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: those of the student)"),
    ] = None
    """Names of the classes, separated by commas, in the order of the labels."""
    text_column: Annotated[
        str | None,
        tyro.conf.arg(metavar="COLUMN", help_behavior_hint="(default: a usual name, such as text)"),
    ] = None
    """Column of a table that has the texts: its name in the header, or its number from 1."""

    def execute(self) -> None:
        """Predicts the files and prints or writes a table."""
        from jaxkd.cli.folders import note_unfinished
        from jaxkd.weights import load_student

        if not self.files:
            raise ValueError("name files or folders to predict, or - for standard input")
        if self.json and self.csv:
            raise ValueError("choose one of --json and --csv")
        if self.output is not None:
            check_new(self.output)
            # Before the predictions, which may take a while.
            check_parent(self.output)
        student = load_student(self.student)
        note_unfinished(self.student)
        names = _choose_names(student, self.class_names, self.student)
        if not 1 <= self.top <= len(names):
            raise ValueError(f"--top {self.top}: choose 1 to {len(names)}, the number of classes")
        failures: list[str] = []
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            predictions = list(self._predict(student, failures.append))
        if predictions and predictions[0].probabilities.size != len(names):
            raise ValueError(
                f"the student has {predictions[0].probabilities.size} classes, but --class-names "
                f"has {len(names)}"
            )
        rows = [Row.of(prediction, names, self.top) for prediction in predictions]
        if rows:
            self._write(rows)
        if failures:
            exit_with(f"{len(failures):,} inputs could not be read, {len(rows):,} are predicted")

    def _predict(
        self, student: "Student", add_failure: Callable[[str], None]
    ) -> Iterator["Prediction"]:
        def report(error: Exception) -> None:
            # At once, since a long list of files takes a while.
            print(f"error: {error}", file=sys.stderr)
            add_failure(str(error))

        arrays = [name for name in self.files if name.lower().endswith(".npy")]
        others = [name for name in self.files if name not in arrays]
        if self.text_column is not None and (student.card.inputs != "texts" or "-" in others):
            raise ValueError("--text-column is for files of texts: leave it out")
        yield from _predict_arrays(student, arrays, report)
        if not others:
            return
        if student.card.inputs == "images":
            yield from _predict_images(student, others, report)
        elif student.card.inputs == "texts":
            yield from _predict_texts(student, others, self.text_column, report)
        else:
            raise ValueError(
                f"{self.student} takes {student.card.dtype} arrays of the shape "
                f"{list(student.card.shape)}, of which the meaning is not known: give .npy files"
            )

    def _write(self, rows: Sequence["Row"]) -> None:
        if self.json:
            text = json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False)
        elif self.csv:
            text = _format_csv(rows)
        else:
            text = _format_table(rows)
        if self.output is None:
            print(text)
        else:
            from jaxkd._files import write_atomically

            write_atomically(self.output, f"{text}\n".encode())
            print(f"wrote {len(rows):,} predictions to {self.output}", file=sys.stderr)


class Prediction(NamedTuple):
    """An input and the probabilities of its classes.

    Attributes:
        origin: The file, or the file and line.
        text: The text, or `None` for an image or array.
        probabilities: float32 `[C]`.
    """

    origin: str
    text: str | None
    probabilities: "np.ndarray"


class Row(NamedTuple):
    """The most probable classes of an input.

    Attributes:
        origin: The file, or the file and line.
        text: The text, or `None` for an image or array.
        classes: Names and probabilities, the most probable first.
    """

    origin: str
    text: str | None
    classes: list[tuple[str, float]]

    @staticmethod
    def of(prediction: Prediction, names: Sequence[str], count: int) -> "Row":
        """Selects the `count` most probable classes; of equal ones, the first labels."""
        order = (-prediction.probabilities).argsort(kind="stable")[:count]
        classes = [(names[label], float(prediction.probabilities[label])) for label in order]
        return Row(prediction.origin, prediction.text, classes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as JSON values."""
        text = {} if self.text is None else {"text": self.text}
        classes = [
            {"class": name, "probability": round(probability, 6)}
            for name, probability in self.classes
        ]
        return {"input": self.origin, **text, "classes": classes}


def _choose_names(student: "Student", option: str | None, path: Path) -> tuple[str, ...]:
    names = student.class_names if option is None else tuple(option.split(","))
    if not names:
        raise ValueError(
            f"{path} does not name its classes: add --class-names first,second,... in the order "
            "of the labels"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"--class-names has {twice[0]!r} more than once")
    if student.class_names and len(names) != len(student.class_names):
        raise ValueError(
            f"--class-names has {len(names)} names, but the student has "
            f"{len(student.class_names)} classes"
        )
    own = student.class_names
    if moved := [name for i, name in enumerate(names) if name in own and own[i] != name]:
        print_warning(
            f"--class-names has {list_some(moved)} in another place than the student, whose order "
            f"is {list_some(own, count=8)}: leave it out unless the student's names are wrong"
        )
    return names


def _predict_arrays(
    student: "Student", files: Sequence[str], report: Callable[[Exception], None]
) -> Iterator[Prediction]:
    import numpy as np

    for file in files:
        try:
            inputs = np.load(file, allow_pickle=False)
            probabilities = student.predict(inputs)
        except (OSError, ValueError, EOFError) as error:
            remedy = ": save one array of numbers" if "allow_pickle" in str(error) else ""
            report(ValueError(f"{file}: {error}{remedy}"))
            continue
        for i, row in enumerate(probabilities):
            yield Prediction(f"{file}[{i}]", None, row)


def _predict_images(
    student: "Student", files: Sequence[str], report: Callable[[Exception], None]
) -> Iterator[Prediction]:
    import numpy as np

    from jaxkd.data.progress import track

    paths = _list_images(files, report)
    counts: Counter[str] = Counter()
    pictures = _read_images(paths, student.card.shape, report)
    for chunk in _in_chunks(track(pictures, description="predicting", total=len(paths)), _CHUNK):
        for _, picture in chunk:
            counts.update(_describe(picture))
        probabilities = student.predict(np.stack([picture.pixels for _, picture in chunk]))
        for (path, _), row in zip(chunk, probabilities, strict=True):
            yield Prediction(str(path), None, row)
    height, width, _ = student.card.shape
    for fact, count in counts.items():
        what = fact.format(height=height, width=width)
        _note(f"{count:,} of {len(paths):,} images {what}")


def _describe(picture: "Picture") -> Iterator[str]:
    """Yields what was done to an image besides reading it."""
    if picture.is_fitted:
        yield "have another size: they are cropped to the centre and scaled to {height} x {width}"
    if picture.is_grey:
        yield "have colours, which the student does not see: they are made grey"
    if picture.is_transparent:
        yield "have transparent parts, which are shown on white"
    if picture.is_animated:
        yield "are animated: the first frame is used"


def _list_images(files: Sequence[str], report: Callable[[Exception], None]) -> list[Path]:
    from jaxkd.data import DataError
    from jaxkd.data.image_folder import find_images

    paths = []
    for path in map(Path, files):
        try:
            if str(path) == "-":
                raise DataError("- is for lines of text, but this student reads images: name files")
            paths += find_images(path) if path.is_dir() else [path]
        except DataError as error:
            report(error)
    return paths


def _read_images(
    paths: Sequence[Path], shape: Any, report: Callable[[Exception], None]
) -> Iterator[tuple[Path, "Picture"]]:
    from concurrent.futures import ThreadPoolExecutor

    from jaxkd.data import DataError
    from jaxkd.data.image_folder import read_image

    def read(path: Path) -> "Picture | DataError":
        try:
            return read_image(path, shape)
        except DataError as error:
            return error

    # Pillow lets other threads run while it decodes.
    with ThreadPoolExecutor() as pool:
        for chunk in _in_chunks(paths, _CHUNK):
            for path, picture in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(picture, DataError):
                    report(picture)
                else:
                    yield path, picture


def _predict_texts(
    student: "Student",
    files: Sequence[str],
    column: str | None,
    report: Callable[[Exception], None],
) -> Iterator[Prediction]:
    from jaxkd.data import DataError

    num_cut = num_texts = 0
    for file in files:
        try:
            texts, origins = _read_lines(file, column)
            tokens, num_cut_here = student.encode(texts, name=origins.__getitem__)
        except (DataError, OSError, ValueError) as error:
            report(error)
            continue
        num_cut += num_cut_here
        num_texts += len(texts)
        for origin, text, row in zip(origins, texts, student.predict(tokens), strict=True):
            yield Prediction(origin, text, row)
    if num_cut:
        _note(
            f"{num_cut:,} of {num_texts:,} texts are longer than the student's "
            f"{student.card.shape[0]} tokens: their ends are cut"
        )


def _read_lines(file: str, column: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """Reads the texts of a file or of standard input, and where each comes from."""
    from jaxkd.data import DataError
    from jaxkd.data.text import read_texts

    if file != "-":
        path = Path(file)
        if path.is_dir():
            raise DataError(f"{path} is a folder, but this student reads texts: name text files")
        return read_texts(path, field=None, column=column)
    # A pipe need not end.
    content = sys.stdin.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise DataError(
            f"standard input has more than {MAX_STDIN:,} characters: give files, or parts of it"
        )
    texts = [line.strip() for line in io.StringIO(content)]
    if not any(texts):
        raise DataError("standard input is empty: give one text a line")
    if not all(texts):
        raise DataError("standard input has an empty line: give one text a line")
    return texts, [f"stdin line {number}" for number in range(1, len(texts) + 1)]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _in_chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _format_csv(rows: Sequence[Row]) -> str:
    has_texts = rows[0].text is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["input", *(["text"] if has_texts else [])]
    for rank in range(1, len(rows[0].classes) + 1):
        suffix = "" if rank == 1 else f"_{rank}"
        header += [f"class{suffix}", f"probability{suffix}"]
    writer.writerow(header)
    for row in rows:
        cells = [row.origin, *([row.text] if has_texts else [])]
        for name, probability in row.classes:
            cells += [name, f"{probability:.6f}"]
        writer.writerow(cells)
    return text.getvalue().removesuffix("\n")


def _format_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        shown = [] if row.text is None else [shorten(row.text, _MAX_SHOWN)]
        classes = [f"{name} {100 * probability:.1f} %" for name, probability in row.classes]
        lines.append([row.origin, *shown, *classes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
