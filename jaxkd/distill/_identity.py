"""Digests of what a training was computed from, by which a checkpoint of another one is noticed.

A checkpoint holds digests of the examples, of the lowered step, of the initial state and of the
weights of the teachers. A teacher that was trained otherwise has other weights, so that a change
reaches every stage that learned from it.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxkd._files import describe_differences
from jaxkd.data.records import Column
from jaxkd.runs import DETERMINISM_FLAGS, UNTRAINED_OPTIONS, fingerprint
from jaxkd.runs.environment import describe_environment, describe_lowering

MESSAGES = {
    "data": "its training data changed",
    "validation": "the validation data changed",
    "program": "its model, loss, optimizer or augmentation changed",
    "cached_teachers": "the network of a cached teacher changed",
    "initial": "its initial weights or optimizer state changed",
    "hyperparameters": "the numbers in its optimizer's state changed",
    "configuration": "the configuration changed, on which its calls of the host may depend",
}
"""Texts of a message on digests that changed. Other values are shown."""

ENVIRONMENTS = {
    "program": "program_environment",
    "cached_teachers": "program_environment",
    "initial": "initial_environment",
}
"""The environment under which a digest may be compared, by the digest's name."""


class TrainingDescriber:
    """Describes trainings by digests. An array that several of them share is read once."""

    def __init__(
        self, validation: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> None:
        """Takes the examples on which every training is evaluated, and the run's configuration."""
        # A reference, because an id is unique only while its object is alive.
        self._digests: dict[int, tuple[weakref.ref, str]] = {}
        lowering, environment = describe_lowering(), describe_environment()
        self._common = {
            "validation": self._hash_tree(validation),
            "program_environment": hash_json(lowering),
            "initial_environment": hash_json([lowering, without_commit(environment)])
            if _repeats_bits(environment)
            else None,
        }
        options = {n: v for n, v in (config or {}).items() if n not in UNTRAINED_OPTIONS}
        self._configuration = hash_json(options)

    def describe(
        self,
        stage_fingerprint: Mapping[str, Any],
        examples: Mapping[str, Any],
        state: Any,
        weights: Mapping[str, Any],
        *,
        is_complete: bool = True,
    ) -> dict[str, Any]:
        """Returns the JSON values that a checkpoint holds to be recognised.

        Args:
            stage_fingerprint: The values that do not depend on the seed.
            examples: The training examples.
            state: The state before the first step.
            weights: The variables of the stages that it learns or starts from, by name.
            is_complete: Whether the digest of the program covers all that it computes with.
                Otherwise the configuration has to tell of a change.
        """
        description = {
            **stage_fingerprint,
            **self._common,
            "data": self._hash_tree(examples),
            # Not through the cache: nobody else has this state.
            "initial": fingerprint_tree(state),
            # A learning rate may be a number of the state, which does not depend on rounding.
            "hyperparameters": fingerprint_tree(
                [leaf for leaf in jax.tree.leaves(state) if not np.ndim(leaf)]
            ),
        }
        if not is_complete:
            description["configuration"] = self._configuration
        if weights:
            description["trained"] = {
                name: self._hash_tree(variables) for name, variables in weights.items()
            }
        return description

    def _hash_tree(self, tree: Any) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return hash_json([[jax.tree_util.keystr(path), self._hash(leaf)] for path, leaf in leaves])

    def _hash(self, array: Any) -> str:
        if isinstance(array, Column):
            return array.digest
        reference, digest = self._digests.get(id(array), (None, ""))
        if reference is not None and reference() is array:
            return digest
        digest = fingerprint_tree(array)
        # Numbers have no references, and cost nothing.
        if isinstance(array, (np.ndarray, jax.Array)):
            self._digests[id(array)] = weakref.ref(array), digest
        return digest


def fingerprint_tree(tree: Any) -> str:
    """Computes a digest of the leaves of a tree and of their paths."""
    digests = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Column):
            digests.append([jax.tree_util.keystr(path), leaf.digest])
            continue
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        # On a device, 64-bit arrays have 32 bits unless x64 is enabled: the training is the same.
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        digests.append([jax.tree_util.keystr(path), fingerprint([array])])
    return hash_json(digests)


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Compares the description in a checkpoint with that of the training that finds it.

    Args:
        before: The description in the checkpoint.
        after: The description of the training.

    Returns:
        One phrase for each value that differs, and whether a digest differs that may do so because
        it was computed in another environment, or was not recorded by an older version.
    """
    is_old = "program" not in before
    digests = {*MESSAGES, *ENVIRONMENTS.values()}
    changes = []
    ignored = digests | {"pretrained", "trained"}
    if differences := describe_differences(before, after, ignore=ignored):
        changes.append(differences)
    # What is shown already explains another program.
    skipped = {"program", "cached_teachers"} if changes else set()
    is_uncertain = is_old
    for name, message in MESSAGES.items():
        if is_old or name in skipped or before.get(name) == after.get(name):
            continue
        environment = ENVIRONMENTS.get(name)
        if name == "configuration" and name not in before:
            is_uncertain = True  # as in checkpoints of older versions
        elif environment is not None and (
            after[environment] is None or before.get(environment) != after[environment]
        ):
            is_uncertain = True
        else:
            changes.append(message)
    names = ("pretrained",) if is_old else ("pretrained", "trained")
    for name in names:
        old, new = before.get(name) or {}, after.get(name) or {}
        changed = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
        changes += [f"the weights of {key!r} changed" for key in changed]
    return changes, is_uncertain


def is_shorter(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    find_program: Callable[[int], str | None],
) -> bool:
    """Returns whether a training took the first steps of another one, which is only longer.

    Args:
        before: The description in the checkpoint.
        after: The description of the longer training.
        find_program: `steps -> digest` of the longer training's program, as if it had as many
            steps; `None` if its steps depend on their number.
    """
    steps = before.get("steps")
    if not isinstance(steps, int) or not steps < after["steps"]:
        return False
    # Everything else has to be equal, under versions and settings that can be compared.
    longer = {**before, "steps": after["steps"], "program": after["program"]}
    if "program" not in before or find_changes(longer, after) != ([], False):
        return False
    return before["program"] == find_program(steps)


def _repeats_bits(environment: Mapping[str, Any]) -> bool:
    """Returns whether another process draws or converts the same initial weights bit for bit."""
    flags = environment["xla_flags"].split()
    return environment["platform"] == "cpu" or all(flag in flags for flag in DETERMINISM_FLAGS)


def without_commit(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an environment without the commit of the source."""
    # A commit changes with every edit, and the digests tell whether that mattered.
    return {name: value for name, value in environment.items() if name != "commit"}


def hash_json(value: Any) -> str:
    """Returns a digest of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
