"""Teachers' logits that are computed once: of a fixed number of views, whole or the largest few, and kept on disk."""

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.checkpoints.store import load, save
from jaxkd.runs import fingerprint
from jaxkd.views import Views, augment_views


class TopK(NamedTuple):
    """The largest logits, and what the others weigh together.

    Attributes:
        values: `[..., k]`, float32, the largest first.
        indices: `[..., k]`, int32, their classes.
        rest: `[...]`, float32, the log-sum-exp of all other logits; −inf where there are none.
    """

    values: Array
    indices: Array
    rest: Array


def top_k(logits: ArrayLike, *, k: int) -> TopK:
    """Keeps the largest logits, and of the others what they weigh together.

    Of C numbers it leaves 2k + 1, of float32 the share (2k + 1) / C of the bytes.

    Args:
        logits: `[..., C]`, floating-point. Of equal ones the first count as larger.
        k: How many to keep, from 1 to C.

    Returns:
        What `expand` takes.

    Raises:
        ValueError: If the logits have no axis of classes, or `k` is out of range.
        TypeError: If they are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> kept = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
        >>> kept.indices.tolist(), [round(float(value), 3) for value in (*jnp.exp(kept.values), jnp.exp(kept.rest))]
        ([1, 3], [0.6, 0.2, 0.2])

    References:
        Without the rest the student's teacher is biased: Anshumann et al., Sparse Logit Sampling,
        https://arxiv.org/abs/2503.16870
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if not logits.ndim or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be from 1 to the number of classes, got k={k} for logits of the shape {logits.shape}")
    logits = logits.astype(jnp.float32)
    values, indices = jax.lax.top_k(logits, k)
    others = jnp.put_along_axis(logits, indices, jnp.float32(-jnp.inf), axis=-1, inplace=False)
    return TopK(values, indices, jax.nn.logsumexp(others, axis=-1))


def expand(kept: TopK, *, num_classes: int) -> Array:
    """Logits of which the largest are as they were, and the others share evenly what they weighed together.

    log(exp(rest) / (C − k)) for each class that was not kept

    At temperature 1 the softmax gives every kept class the probability that it had. At another it does not: the even
    distribution is flatter than theirs was, so that at T > 1 the others weigh more together than they did, and at T < 1
    less. As a higher temperature moves weight to them, it also takes a larger k to tell the student what the teacher
    knows of them. A class at −inf that was not kept shares as well. With k = C the logits come back bit for bit.

    Args:
        kept: Of `top_k`.
        num_classes: C, as it was.

    Returns:
        `[..., C]`, float32.

    Raises:
        ValueError: If there are fewer classes than logits were kept.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kept = top_k(jnp.log(jnp.array([0.05, 0.6, 0.15, 0.2])), k=2)
        >>> print(jax.nn.softmax(expand(kept, num_classes=4)).round(3))
        [0.1 0.6 0.1 0.2]

    References:
        Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers,
        https://arxiv.org/abs/2207.10666
    """
    others = num_classes - kept.values.shape[-1]
    if others < 0:
        raise ValueError(f"{kept.values.shape[-1]} logits were kept of each example, but num_classes is {num_classes}")
    share = jnp.asarray(kept.rest)[..., None] - math.log(max(others, 1))
    filled = jnp.broadcast_to(share, (*share.shape[:-1], num_classes))
    return jnp.put_along_axis(filled, jnp.asarray(kept.indices), kept.values, axis=-1, inplace=False)


def teacher_logits(
    predict: Callable[[Any, Any], ArrayLike],
    variables: Any,
    inputs: ArrayLike,
    *,
    views: Views | None = None,
    top_k: int | None = None,
    folder: str | os.PathLike | None = None,
    notes: Mapping[str, Any] | None = None,
    chunk: int = 2048,
) -> Any:
    """A teacher's logits for all examples, computed or, where they lie on disk already, read.

    What lies on disk is read if its checksums hold and it was computed from the same: weights and pictures of the same
    fingerprints, `top_k`, `notes`, `chunk`, JAX's version and precision, and the kind of device. To tell, all views are
    drawn, as often as the student draws them in `views.count` epochs: so an augmentation that was edited, or closes
    over other values, counts as another, and any function will do.

    Args:
        predict: `(variables, inputs [N, ...]) -> logits [N, ..., C]`, such as `jaxkd.evaluate.make_predict` makes.
        variables: The teacher's.
        inputs: `[N, ...]`.
        views: The pictures that the teacher is shown of each example; `None`: the inputs as they are.
        top_k: How many of the largest logits to keep; `None`: all.
        folder: Where they are kept, those of each teacher, views and so on in a folder of their own, which may be
            deleted; made if absent. Runs may share it. Several hosts must all see it; the first one writes. `None`:
            nowhere.
        notes: JSON values that say what else the logits depend on and only the caller knows, such as the model's
            configuration: weights of the same names and shapes may belong to another.
        chunk: How many examples to predict at a time, all of whose logits are in memory; a multiple of the batch size
            of `predict`.

    Returns:
        Arrays on the host: logits `[N, ..., C]`, float32, or `[N, V, ..., C]` for V views; with `top_k` their `TopK`.

    Raises:
        ValueError: If there is no example, or `chunk` or `top_k` is out of range.
        OSError: If the folder cannot be written.

    Example:
        >>> import jax, numpy as np, tempfile
        >>> from jaxkd import cache, views
        >>> from jaxkd.data import random_flip
        >>> predict = lambda variables, inputs: inputs.mean((1, 3)) @ variables["kernel"]
        >>> teacher, images = {"kernel": np.eye(8, 4)}, np.random.default_rng(0).random((6, 8, 8, 3))
        >>> shown = views.Views(random_flip, jax.random.key(0), 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logits = cache.teacher_logits(predict, teacher, images, views=shown, folder=folder)
        >>> logits.shape
        (6, 4, 4)
        >>> indices, view = np.array([5, 0]), shown.at(9)  # in epoch 9
        >>> batch = views.augment_views(random_flip, shown.key, images[indices], indices, view)
        >>> np.allclose(predict(teacher, batch), logits[indices, view])
        True
    """
    inputs = np.asarray(inputs)
    if not len(inputs) or chunk < 1:
        raise ValueError(f"there must be examples to predict, in chunks of at least 1: {inputs.shape}, chunk={chunk}")
    shown = _make_shown(inputs, views, chunk)
    compute = functools.partial(_compute, predict, variables, shown, views, top_k)
    if folder is None:
        return compute()
    wanted = _describe(variables, shown, views, top_k, notes)
    place = Path(folder) / hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)  # before hours of computing, not after
    found = load(place)
    if found is not None and found.notes == wanted:
        return found.tree["logits"] if top_k is None else TopK(**found.tree)
    if not jax.process_index():
        shutil.rmtree(place, ignore_errors=True)  # a damaged one is of no use
    logits = compute()
    if not jax.process_index():
        _keep(place, {"logits": logits} if top_k is None else logits._asdict(), wanted)
    return logits


_Shown = Callable[[], Iterator[Iterable[np.ndarray]]]
"""Goes through what a teacher is shown: the views, and in each the chunks of all examples."""


def _make_shown(inputs: np.ndarray, views: Views | None, size: int) -> _Shown:
    starts = range(0, len(inputs), size)
    if views is None:
        return lambda: iter([[inputs[start : start + size] for start in starts]])
    draw = jax.jit(functools.partial(augment_views, views.augment, views.key))

    def chunk(start: int, view: int) -> np.ndarray:
        # The last one is filled up, so that there is one program for all.
        rows = np.minimum(np.arange(start, start + min(size, len(inputs)), dtype=np.int32), len(inputs) - 1)
        return np.asarray(draw(inputs[rows], rows, np.int32(view)))[: len(inputs) - start]

    return lambda: ((chunk(start, view) for start in starts) for view in range(views.count))


def _compute(
    predict: Callable[[Any, Any], ArrayLike], variables: Any, shown: _Shown, views: Views | None, k: int | None
) -> Any:
    keep = (lambda logits: logits) if k is None else jax.jit(functools.partial(top_k, k=k))

    def logits_of(pictures: np.ndarray) -> Any:
        return jax.device_get(keep(np.asarray(predict(variables, pictures), np.float32)))

    each = [_join(np.concatenate, map(logits_of, chunks)) for chunks in shown()]
    return each[0] if views is None else _join(functools.partial(np.stack, axis=1), each)


def _join(join: Callable[[Any], np.ndarray], trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: join(leaves), *trees)


def _describe(
    variables: Any, shown: _Shown, views: Views | None, k: int | None, notes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that the logits depend on, as it comes back out of a manifest."""
    flags: Any = jax.config
    device = jax.devices()[0]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(variables))
    told = {
        "variables": {jax.tree_util.keystr(path): fingerprint([np.asarray(leaf)]) for path, leaf in leaves},
        "inputs": fingerprint(itertools.chain.from_iterable(shown())),
        "views": None if views is None else views.count,
        "top_k": k,
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "x64": flags.jax_enable_x64,
        "matmul_precision": flags.jax_default_matmul_precision,
        "notes": dict(notes or {}),
    }
    return json.loads(json.dumps(told, allow_nan=False))


def _keep(place: Path, tree: Any, notes: dict[str, Any]) -> None:
    """Saves in a folder that appears in its place whole: another run may be about the same."""
    with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as temporary:
        whole = Path(temporary) / place.name
        save(whole, 0, tree, notes=notes)
        try:
            whole.rename(place)
        except OSError:
            if not place.exists():  # otherwise the other run was first, with the same
                raise
