"""Pretrained BERTs that commands fine-tune and cut."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxkd import distill, models, transfer
from jaxkd._messages import list_some
from jaxkd.data import DataError, match_classes
from jaxkd.weights import hub


class Classifier(NamedTuple):
    """A pretrained BERT with an output for each class of the data, in their order.

    Attributes:
        bert: The BERT.
        is_fine_tuned: Whether it was trained to tell these classes apart, as its folder says.
    """

    bert: hub.PretrainedBERT
    is_fine_tuned: bool


def load_classifier(name: str, class_names: Sequence[str]) -> Classifier:
    """Loads a pretrained BERT as a classifier of the data's classes.

    A fine-tuned classifier of as many classes keeps its pooling and its head. Others classify the
    mean of the tokens' states, by a layer that is random unless the folder has one of as many
    classes.

    Args:
        name: Its folder or package.
        class_names: The classes of the data, by label.
    """
    with warnings.catch_warnings():
        # Fine-tuning begins with a random layer.
        warnings.filterwarnings("ignore", ".*is drawn at random")
        bert = hub.load_bert(name, num_classes=len(class_names), key=jax.random.key(0))
    if bert.drawn:
        bert = _pool_by_mean(bert)
    if not bert.class_names:
        return Classifier(bert._replace(class_names=tuple(class_names)), is_fine_tuned=False)
    return _order_classifier(name, bert, class_names)


def lowest_layers(count: int) -> list[str]:
    """Returns patterns of the parameters of the embeddings and of the lowest layers."""
    layers = [f"block{i}/{{rest...}}" for i in range(count)]
    return ["{kind}_embedding{rest...}", "embedding_norm/{rest...}", *layers]


def make_transfer(rules: Sequence[transfer.Rule]) -> Callable[[dict, dict], dict]:
    """Makes the function that converts the teacher's weights to a student's, by rules."""

    def convert(source: dict, fresh: dict) -> dict:
        return transfer.transfer(source, fresh, rules=tuple(rules))[0]

    return convert


def _pool_by_mean(bert: hub.PretrainedBERT) -> hub.PretrainedBERT:
    """Replaces the pooling by the mean, which pretraining prepares better than a random layer."""
    params = {
        layer: leaves
        for layer, leaves in bert.variables["params"].items()
        if layer != bert.module.pooling.dense
    }
    return bert._replace(
        module=bert.module.clone(pooling=models.mean_pooling),
        variables=bert.variables | {"params": params},
    )


def _order_classifier(
    name: str, bert: hub.PretrainedBERT, class_names: Sequence[str]
) -> Classifier:
    """Brings the outputs of a fine-tuned classifier into the order of the data's classes."""
    try:
        order = match_classes(bert.class_names, class_names)
    except DataError:
        if distill.is_primary_process():
            print(
                f"{name} classifies {list_some(bert.class_names)}: its fine-tuning starts from "
                f"{bert.class_names[0]} for {class_names[0]}, and so on in this order"
            )
        bert = bert._replace(class_names=tuple(class_names))
        return Classifier(bert, is_fine_tuned=False)
    if (order != np.arange(len(order))).any() and distill.is_primary_process():
        print(f"the classes of {name} are in another order: they are matched by name")
    # The last axis of the kernel and of the bias is that of the classes.
    logits = jax.tree.map(lambda leaf: leaf[..., order], bert.variables["params"]["logits"])
    params = bert.variables["params"] | {"logits": logits}
    bert = bert._replace(
        variables=bert.variables | {"params": params}, class_names=tuple(class_names)
    )
    return Classifier(bert, is_fine_tuned=not bert.drawn)
