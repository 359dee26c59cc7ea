"""Pretrained BERTs that commands fine-tune and cut."""

import warnings
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxkd import distill, models, transfer
from jaxkd._messages import list_some
from jaxkd.data import DataError, match_classes
from jaxkd.weights import hub


def load_classifier(name: str, class_names: Sequence[str]) -> hub.PretrainedBERT:
    """Loads a pretrained BERT that classifies the mean of the tokens' states, to be fine-tuned.

    Args:
        name: Its folder or package.
        class_names: The classes of the data, by label.

    Returns:
        The BERT. Its last layer has the classes of the data in their order. It is random unless the
        folder has a classifier of as many classes.
    """
    with warnings.catch_warnings():
        # Fine-tuning begins with a random layer.
        warnings.filterwarnings("ignore", ".*the classifier is drawn at random")
        bert = hub.load_bert(
            name, num_classes=len(class_names), key=jax.random.key(0), pooling=models.mean_pooling
        )
    if not bert.class_names:
        return bert._replace(class_names=tuple(class_names))
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


def _order_classifier(
    name: str, bert: hub.PretrainedBERT, class_names: Sequence[str]
) -> hub.PretrainedBERT:
    """Brings the outputs of a fine-tuned classifier into the order of the data's classes."""
    try:
        order = match_classes(bert.class_names, class_names)
    except DataError:
        if distill.is_primary_process():
            print(
                f"{name} classifies {list_some(bert.class_names)}: its fine-tuning starts from "
                f"{bert.class_names[0]} for {class_names[0]}, and so on in this order"
            )
        return bert._replace(class_names=tuple(class_names))
    if (order != np.arange(len(order))).any() and distill.is_primary_process():
        print(f"the classes of {name} are in another order: they are matched by name")
    # The last axis of the kernel and of the bias is that of the classes.
    logits = jax.tree.map(lambda leaf: leaf[..., order], bert.variables["params"]["logits"])
    params = bert.variables["params"] | {"logits": logits}
    return bert._replace(
        variables=bert.variables | {"params": params}, class_names=tuple(class_names)
    )
