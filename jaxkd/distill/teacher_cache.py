"""Teacher outputs that are computed once for a data set, and kept on disk and in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxkd.data.read_ahead import read_chunks
from jaxkd.data.records import Column
from jaxkd.data.views import Views, augment_views
from jaxkd.distill._cached_outputs import (
    CachedParts,
    count_bytes,
    describe_size,
    make_parts,
    pack,
    reduce_outputs,
    select_outputs,
    to_stored,
    unpack,
)
from jaxkd.evaluate import PredictFn, make_predict
from jaxkd.models.model import Model, Outputs
from jaxkd.runs import fingerprint
from jaxkd.runs.checkpoints import load, save
from jaxkd.runs.errors import check_folder_name

CHUNK = 2048
"""Number of examples of which all logits are in memory."""
STREAMED_CHUNK = 512
"""The same for examples that are read, of which several chunks are in memory."""
TEMPORARY_PREFIX = ".saving-"
"""Begins the name of a folder in which logits are being saved. A kill may leave it."""


class TeacherCache:
    """The outputs of a plan's teachers, each computed once for the stages and seeds that share it.

    The outputs are kept on disk. Those of each teacher's latest call are also kept in memory.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        predict_fns: Mapping[str, PredictFn],
        folder: str | os.PathLike,
        *,
        make_predict: Callable[..., Callable[[Any, Any], Any]] = make_predict,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Makes an empty cache.

        Args:
            models: The models of the plan by name.
            predict_fns: Functions that predict with them, by the same names.
            folder: Folder of the outputs. It may be shared by several runs.
            make_predict: `(model, read=...) -> predict`, for features: as
                `jaxkd.evaluate.make_predict`.
            report: Gets a line on the size of outputs that were computed.
        """
        self._models = models
        self._predict_fns = predict_fns
        # By model: a new function would compile the same program again.
        self._make_predict = functools.cache(
            lambda model, parts: make_predict(
                model, read=functools.partial(select_outputs, parts=parts)
            )
        )
        self._report = report
        # Several processes predict together. A process that found the logits on its own disk would
        # not take part, and the others would wait for it.
        self._folder = Path(folder) if jax.process_count() == 1 else None
        self._latest: dict[str, tuple[tuple, tuple, Any]] = {}

    def check_folder(self) -> None:
        """Makes the folder, before teachers are trained whose logits it is to hold.

        Raises:
            RunError: If its name is not UTF-8.
            OSError: If it cannot be made or written.
        """
        if self._folder is None:
            return
        folder = _prepare_folder(self._folder)
        # One that others have filled may be read without a permission to write.
        if not os.access(folder, os.W_OK) and not any(folder.iterdir()):
            raise PermissionError(f"{folder} cannot be written: name another folder for the logits")

    def get(
        self,
        name: str,
        variables: dict,
        inputs: Any,
        *,
        augment: Any,
        num_views: int | None,
        view_key: Any,
        parts: CachedParts,
    ) -> Outputs:
        """Returns the outputs of a teacher for all inputs.

        Args:
            name: Name of the teacher in the plan.
            variables: Its variables.
            inputs: `[N, ...]`, all examples.
            augment: `(key, inputs) -> inputs`, the augmentation that makes the views.
            num_views: Number of views of each example; `None` for the inputs as they are.
            view_key: The PRNG key of the views.
            parts: What of the outputs is kept, `Stage.cached_parts`.

        Returns:
            The result of `teacher_outputs`. Equal arguments return the identical arrays, which are
            then put onto the devices only once.
        """
        objects = variables, inputs, augment, view_key
        numbers = num_views, parts
        if name in self._latest:
            latest_objects, latest_numbers, outputs = self._latest[name]
            # Identity, because comparing weights and data by value would read all of them.
            is_same = all(a is b for a, b in zip(objects, latest_objects, strict=True))
            if is_same and numbers == latest_numbers:
                return outputs
        views = None if num_views is None else Views(augment, view_key, num_views)
        outputs, is_new = _get_outputs(
            self._get_predict(name, parts),
            variables,
            inputs,
            views,
            parts,
            self._folder,
            {"program": _hash_program(self._models[name], variables, inputs, parts)},
            STREAMED_CHUNK if isinstance(inputs, Column) else CHUNK,
        )
        if is_new and self._report is not None:
            total = count_bytes(outputs)
            self._report(f"cached teachers: {describe_size(name, total / len(inputs), total)}")
        self._latest[name] = objects, numbers, outputs
        return outputs

    def _get_predict(self, name: str, parts: CachedParts) -> Callable[[Any, Any], Outputs]:
        if parts.are_logits:
            return _as_outputs(self._predict_fns[name])
        # Top-k and dtype are applied to what is predicted.
        selection = CachedParts(parts.features, parts.has_logits)
        return self._make_predict(self._models[name], selection)

    def predict(self, name: str, variables: dict, inputs: Any) -> np.ndarray:
        """Computes the logits of a teacher, and keeps nothing."""
        return self._predict_fns[name](variables, inputs)


def teacher_logits(
    predict: Callable[[Any, Any], ArrayLike],
    variables: Any,
    inputs: Any,
    *,
    views: Views | None = None,
    top_k: int | None = None,
    dtype: str = "float32",
    folder: str | os.PathLike | None = None,
    notes: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK,
) -> Any:
    """Returns a teacher's logits for all examples, from disk if they are there.

    The logits on disk are used if their checksums hold and they were computed from the same
    weights, inputs, views, `top_k`, `dtype`, `notes` and `chunk_size`, with the same JAX version,
    precision and kind of device. To compare the views, all of them are drawn. An augmentation that
    was edited, or that closes over other values, is therefore noticed, whatever function it is.

    Args:
        predict: `(variables, inputs [N, ...]) -> logits [N, ..., C]`, such as
            `jaxkd.evaluate.make_predict` makes.
        variables: The teacher's variables.
        inputs: `[N, ...]`, an array or a column of `data.Records`, of which the digest of the
            records and a sample are compared.
        views: The views that the teacher sees of each example; `None` for the inputs as they are.
        top_k: Number of the largest logits to keep; `None` keeps all.
        dtype: "float32", "float16" or "bfloat16", the dtype in which they are kept.
        folder: Folder of the logits, made if it does not exist. Runs may share it. Each combination
            of teacher, views and so on gets a folder of its own inside, which may be deleted.
            Several processes must all see it; the primary one writes. `None` keeps nothing on disk.
        notes: JSON values of whatever else the logits depend on, such as the model's configuration:
            two models may have weights of the same names and shapes.
        chunk_size: Number of examples to predict at a time, with all their logits in memory. Make
            it a multiple of the batch size of `predict`.

    Returns:
        Arrays on the host: logits `[N, ..., C]` in `dtype`, or `[N, V, ..., C]` for V views; with
        `top_k`, their `TopK`.

    Raises:
        ValueError: If there is no example, `chunk_size` or `top_k` is out of range, `dtype` is
            another one or too small for a logit, or `predict` returns another number of rows than
            there are examples.
        OSError: If the folder cannot be written.

    Example:
        >>> import jax, numpy as np, tempfile
        >>> from jaxkd.data import random_flip, views
        >>> from jaxkd.distill import teacher_cache
        >>> predict = lambda variables, inputs: inputs.mean((1, 3)) @ variables["kernel"]
        >>> teacher = {"kernel": np.eye(8, 4)}
        >>> images = np.random.default_rng(0).random((6, 8, 8, 3))
        >>> four_views = views.Views(random_flip, jax.random.key(0), 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logits = teacher_cache.teacher_logits(
        ...         predict, teacher, images, views=four_views, folder=folder
        ...     )
        >>> logits.shape
        (6, 4, 4)
        >>> indices = np.array([5, 0])
        >>> view = four_views.at(9)  # in epoch 9
        >>> batch = views.augment_views(random_flip, four_views.key, images[indices], indices, view)
        >>> np.allclose(predict(teacher, batch), logits[indices, view])
        True
    """
    parts = make_parts(top_k=top_k, dtype=dtype)
    predict_outputs = _as_outputs(predict)
    return _get_outputs(
        predict_outputs, variables, inputs, views, parts, folder, notes, chunk_size
    )[0].logits


def teacher_outputs(
    predict: Callable[[Any, Any], Outputs],
    variables: Any,
    inputs: Any,
    *,
    features: Sequence[str],
    has_logits: bool = True,
    views: Views | None = None,
    top_k: int | None = None,
    dtype: str = "float32",
    folder: str | os.PathLike | None = None,
    notes: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK,
) -> Outputs:
    """Returns features and logits of a teacher for all examples, from disk if they are there.

    Hidden states of width H take V / H times less than logits of V classes. A fused loss, such as
    `losses.fused_linear_kl_divergence`, computes the same logits from them and the teacher's head.

    Args:
        predict: `(variables, inputs [N, ...]) -> Outputs` with one row for each example, such as
            `jaxkd.evaluate.make_predict(model, read=lambda outputs: outputs)` makes.
        variables: The teacher's variables.
        inputs: `[N, ...]`, as for `teacher_logits`.
        features: Names of the features to keep.
        has_logits: Whether the logits are kept, too.
        views: As for `teacher_logits`, like all that follow.
        top_k: Number of the largest logits to keep; `None` keeps all.
        dtype: Dtype of logits and floating-point features.
        folder: Folder of the outputs.
        notes: JSON values of whatever else they depend on.
        chunk_size: Number of examples to predict at a time.

    Returns:
        Arrays on the host: `features` by name, `[N, ...]` or `[N, V, ...]` for V views, and
        `logits`, as `teacher_logits` returns them, or `None`.

    Raises:
        ValueError: As for `teacher_logits`, or if the outputs lack a feature, or nothing is kept.
        OSError: If the folder cannot be written.

    Example:
        >>> import numpy as np
        >>> from jaxkd.distill import teacher_cache
        >>> from jaxkd.models import Outputs
        >>> def predict(variables, inputs):
        ...     states = inputs @ variables["body"]
        ...     return Outputs(states @ variables["head"], {"states": states})
        >>> teacher = {"body": np.ones((3, 2)), "head": np.ones((2, 100))}
        >>> cached = teacher_cache.teacher_outputs(
        ...     predict, teacher, np.ones((5, 3)), features=["states"], has_logits=False
        ... )
        >>> cached.features["states"].shape, cached.logits
        ((5, 2), None)
    """
    parts = make_parts(features, has_logits, top_k, dtype)
    return _get_outputs(predict, variables, inputs, views, parts, folder, notes, chunk_size)[0]


def _as_outputs(predict: Callable[[Any, Any], ArrayLike]) -> Callable[[Any, Any], Outputs]:
    """Makes a function that returns what another one predicts as the logits of `Outputs`."""

    def predict_outputs(variables: Any, inputs: Any) -> Outputs:
        logits: Any = np.asarray(predict(variables, inputs))
        return Outputs(logits, {})

    return predict_outputs


def _get_outputs(
    predict: Callable[[Any, Any], Outputs],
    variables: Any,
    inputs: Any,
    views: Views | None,
    parts: CachedParts,
    folder: str | os.PathLike | None,
    notes: Mapping[str, Any] | None,
    chunk_size: int,
) -> tuple[Outputs, bool]:
    """Returns the outputs for all examples, and whether they were computed.

    The arguments are those of `teacher_outputs`.
    """
    inputs = _as_host_array(inputs)
    if not len(inputs) or chunk_size < 1:
        raise ValueError(
            "teacher_logits needs at least one example and a chunk_size of at least 1, "
            f"got inputs of the shape {inputs.shape} and chunk_size={chunk_size}"
        )
    iterate_views = _make_view_iterator(inputs, views, chunk_size)
    compute = functools.partial(_compute, predict, variables, iterate_views, views, parts)
    if folder is None:
        return compute(), True
    if isinstance(inputs, Column):
        # What identifies the records, and the views of a sample, stand for all of them.
        notes = {**(notes or {}), "records": inputs.digest}
        iterate_views = _make_view_iterator(inputs.sample, views, chunk_size)
    expected_notes = _describe_origin(variables, iterate_views, views, parts, notes)
    digest = hashlib.sha256(json.dumps(expected_notes, sort_keys=True).encode()).hexdigest()
    # The name need not be unique for certain: the notes are compared in full below.
    path = _prepare_folder(folder) / digest[:16]  # fails before hours of computing, not after
    saved = load(path)
    if saved is not None and saved.notes == expected_notes:
        return unpack(saved.tree, parts), False
    is_primary = not jax.process_index()
    if is_primary:
        shutil.rmtree(path, ignore_errors=True)  # damaged outputs are of no use
    # Every process computes, because a prediction is one program over the devices of all of them.
    outputs = compute()
    if is_primary:
        _save(path, pack(outputs), expected_notes)
    return outputs, True


def _prepare_folder(folder: str | os.PathLike) -> Path:
    """Makes the folder of the logits, and deletes what a killed process left there."""
    path = check_folder_name(folder)
    path.mkdir(parents=True, exist_ok=True)
    for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):
        with _lock_folder(leftover) as is_locked:
            # Another run that is saving holds its lock.
            if is_locked:
                shutil.rmtree(leftover, ignore_errors=True)
    return path


_IterateViews = Callable[[], Iterator[Iterable[np.ndarray]]]
"""Iterates over the views, and within each over chunks of all examples."""


def _make_view_iterator(inputs: Any, views: Views | None, chunk_size: int) -> _IterateViews:
    # The last chunk of views is filled up, so that one program draws all chunks.
    size = chunk_size if views is None else min(chunk_size, len(inputs))
    chunks = [np.arange(start, start + size) for start in range(0, len(inputs), chunk_size)]
    chunks = [np.minimum(rows, len(inputs) - 1).astype(np.int32) for rows in chunks]
    if views is None:
        # Slices, of which NumPy makes no copy.
        slices = [slice(rows[0], rows[0] + chunk_size) for rows in chunks]
        return lambda: iter([read_chunks(inputs, slices)])
    draw = jax.jit(functools.partial(augment_views, views.augment, views.key))

    def draw_chunks(view: int) -> Iterator[np.ndarray]:
        for rows, chunk in zip(chunks, read_chunks(inputs, chunks), strict=True):
            yield np.asarray(draw(chunk, rows, np.int32(view)))[: len(inputs) - rows[0]]

    return lambda: map(draw_chunks, range(views.count))


def _as_host_array(inputs: Any) -> Any:
    return inputs if isinstance(inputs, Column) else np.asarray(inputs)


def _compute(
    predict: Callable[[Any, Any], Outputs],
    variables: Any,
    iterate_views: _IterateViews,
    views: Views | None,
    parts: CachedParts,
) -> Outputs:
    # Reduced chunk by chunk, since all logits of a large vocabulary would not fit into memory.
    reduce = jax.jit(functools.partial(reduce_outputs, parts=parts))

    def predict_chunk(inputs: np.ndarray) -> Outputs:
        outputs = select_outputs(predict(variables, inputs), parts)
        # A dropped last batch would shift the rows of all examples after it.
        for name, array in {"logits": outputs.logits, **outputs.features}.items():
            if array is not None and array.shape[:1] != (len(inputs),):
                raise ValueError(
                    f"predict returns the shape {array.shape} for {len(inputs)} examples: return "
                    f"one row of {name} per example, in order, without dropping the last batch"
                )
        if parts.top_k is not None:
            outputs = reduce(outputs)
        return to_stored(jax.device_get(outputs), parts.dtype)

    per_view = [_join(np.concatenate, map(predict_chunk, chunks)) for chunks in iterate_views()]
    return per_view[0] if views is None else _join(functools.partial(np.stack, axis=1), per_view)


def _join(join: Callable[[Any], np.ndarray], trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: join(leaves), *trees)


def _describe_origin(
    variables: Any,
    iterate_views: _IterateViews,
    views: Views | None,
    parts: CachedParts,
    notes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns everything that the outputs depend on, as JSON values."""
    config: Any = jax.config
    device = jax.devices()[0]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(variables))
    origin = {
        "variables": {
            jax.tree_util.keystr(path): fingerprint([np.asarray(leaf)]) for path, leaf in leaves
        },
        "inputs": fingerprint(itertools.chain.from_iterable(iterate_views())),
        "views": None if views is None else views.count,
        "top_k": parts.top_k,
        **parts.describe(),
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "x64": config.jax_enable_x64,
        "matmul_precision": config.jax_default_matmul_precision,
        "notes": dict(notes or {}),
    }
    # Through JSON and back, so that it compares equal to what a manifest holds.
    return json.loads(json.dumps(origin, allow_nan=False))


def _hash_program(model: Model, variables: dict, inputs: Any, parts: CachedParts) -> str:
    """Returns a digest of the computation of a model, which its weights do not determine."""
    inputs = _as_host_array(inputs)
    shapes = jax.eval_shape(lambda: variables)
    example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)

    def read(outputs: Outputs) -> Any:
        return outputs.logits if parts.are_logits else select_outputs(outputs, parts)

    # A lambda, whose name is part of the text: another one would outdate the caches that there are.
    forward = jax.jit(
        lambda variables, inputs: read(model.apply(variables, inputs, train=False)[0])
    )
    text = forward.lower(shapes, example).as_text()
    digest = hashlib.sha256(text.encode())
    # Host callbacks, and constants that JAX makes arguments, are not in the text. The outputs for
    # an example take their place.
    if any(marker in text for marker in ("callback", "host_transfer", "jax.const")):
        for leaf in jax.tree.leaves(forward(variables, inputs[:1])):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _save(path: Path, tree: Any, notes: dict[str, Any]) -> None:
    """Saves to a temporary folder and renames it, because another run may save the same logits."""
    with _make_locked_folder(path.parent) as temporary:
        temporary_path = temporary / path.name
        save(temporary_path, 0, tree, notes=notes)
        try:
            temporary_path.rename(path)
        except OSError:
            # If the path exists, another run has saved the same logits in the meantime.
            if not path.exists():
                raise


@contextlib.contextmanager
def _make_locked_folder(parent: Path) -> Generator[Path]:
    """Makes a temporary folder that `_prepare_folder` of another run leaves alone."""
    while True:
        # In the same folder, because a file system renames only within itself.
        with (
            tempfile.TemporaryDirectory(
                prefix=TEMPORARY_PREFIX, dir=parent, ignore_cleanup_errors=True
            ) as temporary,
            _lock_folder(Path(temporary)) as is_locked,
        ):
            # Another run may have found the folder before it was locked. Without locks, none
            # deletes it.
            if os.path.isdir(temporary) and is_locked is not False:
                yield Path(temporary)
                return


@contextlib.contextmanager
def _lock_folder(path: Path) -> Generator[bool | None]:
    """Locks a folder for the block, which a kill ends as well.

    Yields:
        Whether it is locked now, or `None` if this system or file system cannot lock folders.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except ImportError:  # Windows
        yield None
        return
    except OSError:
        yield False
        return
    try:
        yield _try_lock(fcntl, descriptor)
    finally:
        os.close(descriptor)


def _try_lock(fcntl: Any, descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
