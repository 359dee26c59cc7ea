"""Several models as one: they get the same inputs, and predict together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.models.model import Inputs, Model, Outputs


def join(members: Mapping[str, Model]) -> Model:
    """Makes one model of several, whose probabilities are the mean of theirs.

    Its parameters and statistics are those of the members by name. Its logits are the logarithm of
    the mean of the members' probabilities. Its features are those of each member, such as
    "first/stage1", and its logits, "first/logits".

    Args:
        members: The models by name. They take the same inputs and have the same classes.

    Returns:
        The model.

    Raises:
        ValueError: If there is no member, or a name is empty or has a "/". From `apply`, if the
            members have logits of different shapes.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd import models
        >>> model = models.from_linen(models.CNN(features=(4,), hidden=8))
        >>> images = np.zeros((1, 8, 8, 3), np.float32)
        >>> both = models.join({"first": model, "second": model})
        >>> variables = both.init(jax.random.key(0), images)
        >>> outputs, _ = both.apply(variables, images, train=False)
        >>> outputs.logits.shape, outputs.features["second/logits"].shape
        ((1, 10), (1, 10))
    """
    members = dict(members)
    if not members:
        raise ValueError("there are no models to join: pass at least one by name")
    for name in members:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"names of members must be text without a '/', got {name!r:.60}")

    def init(key: Array, inputs: Inputs) -> dict:
        variables = {
            name: model.init(jax.random.fold_in(key, number), inputs)
            for number, (name, model) in enumerate(members.items())
        }
        return join_variables(variables)

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        features, batch_stats, log_probabilities = {}, {}, []
        for number, (name, model) in enumerate(members.items()):
            member_key = None if key is None else jax.random.fold_in(key, number)
            outputs, batch_stats[name] = model.apply(
                take_member(variables, name), inputs, train=train, key=member_key
            )
            features[f"{name}/logits"] = outputs.logits
            features |= {f"{name}/{path}": value for path, value in outputs.features.items()}
            log_probabilities.append(jax.nn.log_softmax(outputs.logits.astype(jnp.float32)))
        shapes = {
            name: logits.shape for name, logits in zip(members, log_probabilities, strict=True)
        }
        if len({*shapes.values()}) > 1:
            raise ValueError(
                f"models of one ensemble must have the same classes, but have logits {shapes}"
            )
        stacked = jnp.stack(log_probabilities)
        logits = jax.nn.logsumexp(stacked, axis=0) - jnp.log(jnp.float32(len(members)))
        return Outputs(logits, features), batch_stats

    max_values = {model.max_value for model in members.values()}
    return Model(init, apply, max_value=max_values.pop() if len(max_values) == 1 else None)


def join_variables(variables: Mapping[str, Mapping[str, Any]]) -> dict:
    """Returns the variables of a joint model, from those of its members by name."""
    return {
        "params": {name: member["params"] for name, member in variables.items()},
        "batch_stats": {name: member.get("batch_stats", {}) for name, member in variables.items()},
    }


def take_member(variables: Mapping[str, Any], name: str) -> dict:
    """Returns the variables of a member of a joint model.

    Raises:
        ValueError: If there is no member of that name.
    """
    if name not in variables["params"]:
        raise ValueError(
            f"the joint model has no member {name!r:.60}, but {', '.join(variables['params'])}"
        )
    return {
        "params": variables["params"][name],
        "batch_stats": variables.get("batch_stats", {}).get(name, {}),
    }


def take_member_outputs(outputs: Outputs, name: str) -> Outputs:
    """Returns the outputs of a member of a joint model."""
    prefix = f"{name}/"
    features = {
        path.removeprefix(prefix): value
        for path, value in outputs.features.items()
        if path.startswith(prefix)
    }
    return Outputs(features.pop("logits"), features)
