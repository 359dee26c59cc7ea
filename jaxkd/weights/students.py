"""A student alone, with all that its user needs: weights, program, class names, tokenizer.

student.safetensors  the weights
student.jaxexport    the program, which holds the weights; a zip archive at its end, which JAX does
                     not read, holds the two files below and the program's SHA-256, so that this
                     file is enough
student.json         class names, inputs, network and normalisation; checksums of the other files
tokenizer.json       the tokenizer of texts
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxkd._extras import add_install_command
from jaxkd._files import write_atomically
from jaxkd._messages import first_line, list_some, shorten
from jaxkd.weights.files import RUN_FILE, check_regular_file
from jaxkd.weights.programs import serialize_program
from jaxkd.weights.safetensors_files import (
    check_class_names,
    load_safetensors,
    save_safetensors,
)
from jaxkd.weights.student_card import StudentCard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jaxkd.models.model import Model

PROGRAM_FILE = "student.jaxexport"
CARD_FILE = "student.json"
TOKENIZER_FILE = "tokenizer.json"
_CHECKSUM_FILE = "program.sha256"
_BATCH_SIZE = 256
# Texts are padded to a multiple of as many tokens, so that few lengths are compiled.
_LENGTH_STEP = 32
# A zip archive holds the time of its files, and equal students must have equal bytes.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
# What the last record of an archive begins with, and its length without a comment.
_ZIP_END = b"PK\x05\x06"
_MAX_ZIP_END = 22


def save_student(
    folder: str | os.PathLike,
    model: "Model",
    variables: dict,
    example: Any,
    *,
    class_names: Sequence[str] = (),
    tokenizer: "Tokenizer | None" = None,
    max_length: int | None = None,
) -> None:
    """Saves a classifier so that others can use it, with or without this library.

    Equal arguments give equal bytes on one version of JAX.

    Args:
        folder: An existing folder. The files are listed at the top of this module; those of an
            earlier student are replaced.
        model: The model, including its normalisation of the inputs. If it was made from a module of
            `jaxkd.models`, the description names the network.
        variables: The model's variables.
        example: One input, without the batch axis; its shape and dtype alone count.
        class_names: Name of each class, by label.
        tokenizer: For texts: the tokenizer that made the inputs.
        max_length: For texts: the largest number of tokens. By default that of the example.

    Raises:
        ImportError: If safetensors or flatbuffers is missing.
        TypeError, ValueError: If the names of the classes are not different strings, or not as many
            as the model has classes, or the variables are those of another model.
    """
    folder = Path(folder)
    class_names = check_class_names(class_names)
    shape, dtype = np.shape(example), jnp.result_type(example)
    _check_outputs(model, variables, jax.ShapeDtypeStruct((1, *shape), dtype), len(class_names))
    if tokenizer is not None:
        max_length = shape[0] if max_length is None else max_length
        shape = (max_length,)
    save_safetensors(folder / RUN_FILE, variables, class_names=class_names)
    checksums = {RUN_FILE: _digest((folder / RUN_FILE).read_bytes())}
    parts = {}
    if tokenizer is not None:
        parts[TOKENIZER_FILE] = tokenizer.to_str(pretty=False).encode()
        checksums[TOKENIZER_FILE] = _digest(parts[TOKENIZER_FILE])
    card = StudentCard(
        _kind_of_inputs(shape, dtype, tokenizer),
        shape,
        dtype.name,
        tuple(class_names),
        *_describe_network(model),
        checksums,
    )
    parts = {CARD_FILE: card.to_json().encode()} | parts
    program = serialize_program(
        model,
        variables,
        jax.ShapeDtypeStruct(np.shape(example), dtype),
        max_length=None if tokenizer is None else max_length,
    )
    for name, content in parts.items():
        write_atomically(folder / name, content)
    checksum = {_CHECKSUM_FILE: _digest(program).encode()}
    write_atomically(folder / PROGRAM_FILE, program + _make_archive(parts | checksum))


def _check_outputs(model: "Model", variables: dict, inputs: Any, num_names: int) -> None:
    """Raises `ValueError` if a model does not take its variables, or has other classes."""

    def apply(variables: dict, inputs: Any) -> Any:
        return model.apply(variables, inputs, train=False)[0].logits

    try:
        shape = jax.eval_shape(apply, variables, inputs).shape
    except Exception as error:
        # Other errors say what is wrong with the example.
        if not type(error).__module__.startswith("flax."):
            raise
        raise ValueError(
            f"the variables do not fit the model: {shorten(error, 150)}; pass those of this model"
        ) from error
    if num_names and shape[-1] != num_names:
        raise ValueError(
            f"class_names has {num_names} names, but the model has {shape[-1]} classes: name each, "
            "in the order of the labels"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _describe_network(model: "Model") -> tuple[str | None, Any, Any]:
    """Returns a description of the model's network, and its normalisation."""
    if model.network is None:
        return None, None, None
    # Imported here, because it imports Flax, which the model has imported already.
    from jaxkd.models.description import describe_module

    return describe_module(model.network.module), model.network.mean, model.network.std


def _kind_of_inputs(shape: tuple[int, ...], dtype: Any, tokenizer: Any) -> str:
    if tokenizer is not None:
        return "texts"
    # The scale of pixels of another dtype is not known.
    is_image = len(shape) == 3 and shape[-1] in (1, 3) and dtype == np.uint8
    return "images" if is_image else "arrays"


def _make_archive(parts: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(
                zipfile.ZipInfo(name, _ZIP_DATE), content, compress_type=zipfile.ZIP_DEFLATED
            )
    return archive.getvalue()


class Student:
    """A saved classifier, ready to predict.

    Attributes:
        card: Its description.
        class_names: Name of each class, by label; empty if they are not known.
    """

    def __init__(
        self, card: StudentCard, logits_fn: Callable[[Any], Any], tokenizer: "Tokenizer | None"
    ) -> None:
        """Wraps a function from a batch of inputs to logits `[B, C]`; see `load_student`."""
        self.card = card
        self.class_names = card.class_names
        self._logits_fn = jax.jit(logits_fn)
        self._tokenizer = tokenizer

    def predict(self, inputs: Any) -> np.ndarray:
        """Returns the probabilities of the classes.

        Args:
            inputs: `[N, ...]` of the card's shape and dtype, such as uint8 images
                `[N, H, W, C]` or int32 tokens `[N, S]`.

        Returns:
            float32 `[N, C]`, the softmax of the logits.

        Raises:
            ValueError: If shape or dtype is another one.
        """
        inputs = np.asarray(inputs)
        self._check(inputs)
        probabilities = []
        for start in range(0, len(inputs), _BATCH_SIZE):
            batch = inputs[start : start + _BATCH_SIZE]
            # A batch of another size would be compiled again.
            size = _BATCH_SIZE if len(inputs) > _BATCH_SIZE else len(batch)
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
            logits = jnp.asarray(self._logits_fn(padded), jnp.float32)
            probabilities.append(np.asarray(jax.nn.softmax(logits))[: len(batch)])
        return np.concatenate(probabilities)

    def encode(
        self, texts: Sequence[str], *, name: Callable[[int], str] = "text {}".format
    ) -> tuple[np.ndarray, int]:
        """Encodes texts as the student's tokens.

        Args:
            texts: The texts.
            name: Returns the name of a text in error messages, from its index.

        Returns:
            int32 `[N, S]`, and the number of texts that were cut to the student's largest number of
            tokens.

        Raises:
            ValueError: If the student does not read texts.
            jaxkd.data.DataError: If a text is empty.
        """
        from jaxkd.data import tokens

        if self._tokenizer is None:
            raise ValueError(f"this student reads {self.card.inputs}, not texts")
        (max_length,) = self.card.shape
        ids = tokens.encode(self._tokenizer, texts, max_length=max_length, truncate=True, name=name)
        # Only a text that fills its row may have been cut.
        full = [text for text, row in zip(texts, ids, strict=True) if row[max_length - 1 :].any()]
        lengths = [len(encoding.ids) for encoding in self._tokenizer.encode_batch(full)]
        length = min(-(-ids.shape[1] // _LENGTH_STEP) * _LENGTH_STEP, max_length)
        padded = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
        return padded, sum(count > max_length for count in lengths)

    def _check(self, inputs: np.ndarray) -> None:
        """Raises `ValueError` for inputs of another shape or dtype."""
        shape, dtype = self.card.shape, self.card.dtype
        is_text = self.card.inputs == "texts"
        fits = (
            inputs.ndim == 2 and inputs.shape[1] <= shape[0]
            if is_text
            else (inputs.shape[1:] == shape)
        )
        if not fits or inputs.dtype != dtype or not len(inputs):
            lengths = ", ".join(map(str, shape))
            expected = f"[N, S] with S up to {lengths}" if is_text else f"[N, {lengths}]"
            raise ValueError(
                f"this student takes {dtype} {expected}, N at least 1, but got {inputs.dtype} "
                f"{list(inputs.shape)}"
            )


def load_student(path: str | os.PathLike) -> Student:
    """Loads a student that `save_student` saved.

    The program is used if there is one, which needs jax and flatbuffers alone. Otherwise the
    network is made from its description and the weights, which needs Flax.

    Args:
        path: A `.jaxexport` file, also one without a description at its end; or the folder of a run
            or of a student.

    Returns:
        The student.

    Raises:
        ValueError: If there is no student, it is damaged, or the files of the folder are not of one
            student.
        OSError: If the file does not exist or cannot be read.

    Example:
        >>> import tempfile
        >>> import jax, numpy as np
        >>> from jaxkd import models, weights
        >>> model = models.from_linen(models.CNN(features=(4,), hidden=8, num_classes=2))
        >>> images = np.zeros((3, 8, 8, 1), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights.save_student(
        ...         folder, model, variables, images[0], class_names=["cat", "dog"]
        ...     )
        ...     student = weights.load_student(folder)
        >>> student.class_names, student.predict(images).shape
        (('cat', 'dog'), (3, 2))
    """
    path = Path(path)
    if not path.is_dir():
        return _load_program(path)
    check_files(path)
    if (path / PROGRAM_FILE).is_file():
        return _load_program(path / PROGRAM_FILE)
    if (path / RUN_FILE).is_file() and (path / CARD_FILE).is_file():
        return _load_weights(path)
    raise ValueError(
        f"{path} has no student: a run leaves {PROGRAM_FILE} when it is finished; name that file "
        "or its folder"
    )


def read_card(folder: str | os.PathLike) -> StudentCard:
    """Reads the description of a student from its folder.

    Raises:
        ValueError: If it is damaged.
        OSError: If there is none.
    """
    path = Path(folder) / CARD_FILE
    check_regular_file(path)
    return StudentCard.from_json(path.read_bytes(), path)


def find_student(path: str | os.PathLike) -> Path | None:
    """Finds the folder of a student that a path names, itself or by one of the student's files.

    Returns:
        The folder; `None` if there is no description of a student.
    """
    path = Path(path)
    is_file = path.name in (RUN_FILE, PROGRAM_FILE, CARD_FILE, TOKENIZER_FILE)
    folder = path.parent if is_file else path
    return folder if (folder / CARD_FILE).is_file() else None


def check_files(folder: str | os.PathLike) -> None:
    """Checks that the files in a folder were saved as one student.

    Files of earlier versions have no checksums, and only the descriptions are compared.

    Raises:
        ValueError: If weights, tokenizer or program do not belong to the description, or a file is
            damaged.
        OSError: If a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / CARD_FILE).is_file():
        return
    card = read_card(folder)
    others = [
        name
        for name in (RUN_FILE, TOKENIZER_FILE)
        if name in card.checksums
        and (folder / name).is_file()
        and _digest((folder / name).read_bytes()) != card.checksums[name]
    ]
    program = folder / PROGRAM_FILE
    remedy = ""
    if program.is_file():
        remedy = f", or name {PROGRAM_FILE} itself to use that"
        content = _read_archive(program, program.read_bytes()).get(CARD_FILE)
        inner = card if content is None else StudentCard.from_json(content, program)
        if (inner, inner.checksums) != (card, card.checksums):
            others.append(PROGRAM_FILE)
    if others:
        raise ValueError(
            f"{shorten(folder, 80)} holds files of different students: {' and '.join(others)} "
            f"{'does' if len(others) == 1 else 'do'} not belong to {CARD_FILE}; save the student "
            f"again with weights.save_student{remedy}"
        )


def _load_program(path: Path) -> Student:
    check_regular_file(path)
    with add_install_command():
        import flatbuffers  # noqa: F401  (jax.export needs it, and says so less clearly)

    content = path.read_bytes()
    parts = _read_archive(path, content)
    try:
        program = export.deserialize(bytearray(content))
        (inputs,) = program.in_avals
        (logits,) = program.out_avals
    # flatbuffers raises whatever the bytes lead to.
    except Exception as error:
        raise ValueError(
            f"{path} is no complete program of jax.export ({first_line(error)}): name a "
            ".jaxexport file or the folder of a run"
        ) from error
    if CARD_FILE in parts:
        card = StudentCard.from_json(parts[CARD_FILE], path)
    else:
        shape = tuple(length if isinstance(length, int) else 0 for length in inputs.shape[1:])
        card = StudentCard(_kind_of_inputs(shape, inputs.dtype, None), shape, inputs.dtype.name)
    _check_classes(path, card, logits.shape[-1])
    tokenizer = _read_tokenizer(parts.get(TOKENIZER_FILE), path)
    return Student(card, program.call, tokenizer)


def load_network(folder: str | os.PathLike) -> tuple["Model", dict, StudentCard]:
    """Makes the model of a saved student from its description and its weights; needs Flax.

    Args:
        folder: The folder of a run or of a student.

    Returns:
        The model with its normalisation, its variables, and the description.

    Raises:
        ValueError: If the student is no network of `jaxkd.models`, it is damaged, or the files of
            the folder are not of one student.
        OSError: If a file does not exist or cannot be read.
    """
    from jaxkd import models

    folder = Path(folder)
    card = read_card(folder)
    check_files(folder)
    if card.network is None:
        raise ValueError(
            f"{folder} has the weights of a network that jaxkd cannot make: use its {PROGRAM_FILE}"
        )
    variables = load_safetensors(folder / RUN_FILE)
    model = models.from_linen(models.make_module(card.network))
    if card.mean is not None and card.std is not None:
        model = models.with_input_normalization(model, np.array(card.mean), np.array(card.std))
    inputs = jax.ShapeDtypeStruct((1, *card.shape), card.dtype)
    try:
        outputs, _ = jax.eval_shape(
            lambda inputs: model.apply(variables, inputs, train=False), inputs
        )
    # Flax raises errors of its own for variables that are missing or have another shape.
    except Exception as error:
        raise ValueError(
            f"the weights in {folder} do not fit {shorten(card.network, 60)} "
            f"({first_line(error)}): export the student again"
        ) from error
    _check_classes(folder, card, outputs.logits.shape[-1])
    return model, variables, card


def _load_weights(folder: Path) -> Student:
    model, variables, card = load_network(folder)
    tokenizer = None
    if card.inputs == "texts":
        tokenizer = _read_tokenizer((folder / TOKENIZER_FILE).read_bytes(), folder)

    def logits_fn(inputs: Any) -> Any:
        return model.apply(variables, inputs, train=False)[0].logits

    return Student(card, logits_fn, tokenizer)


def _check_classes(path: Path, card: StudentCard, num_classes: int) -> None:
    if card.class_names and len(card.class_names) != num_classes:
        raise ValueError(
            f"{path} names {len(card.class_names)} classes ({list_some(card.class_names)}), but "
            f"has {num_classes} logits: export the student again"
        )


def _read_archive(path: Path, content: bytes) -> dict[str, bytes]:
    """Returns the files in the archive at the end of a program; none if there is no archive."""
    if _ZIP_END not in content[-_MAX_ZIP_END:]:
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            # A small archive may unpack to any size.
            limit = max(64 * 2**20, 16 * len(content))
            if sum(info.file_size for info in infos.values()) > limit:
                raise ValueError("it unpacks to far more than its size")
            parts = {name: archive.read(info) for name, info in infos.items()}
            program = content[: min(info.header_offset for info in infos.values())]
        if parts.get(_CHECKSUM_FILE) != _digest(program).encode() or CARD_FILE not in parts:
            raise ValueError("its program does not have its checksum")
        return parts
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): copy it again") from error


def _read_tokenizer(content: bytes | None, path: Path) -> "Tokenizer | None":
    if content is None:
        return None
    with add_install_command():
        from tokenizers import Tokenizer
    try:
        return Tokenizer.from_str(content.decode())
    # tokenizers raises plain exceptions.
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {path} is damaged ({first_line(error)}): export the student again"
        ) from error
