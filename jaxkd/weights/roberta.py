"""RoBERTa as the BERT that it is, but for names, the id of padding and the first position."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MODEL_TYPES = ("roberta", "xlm-roberta")
"""Values of `model_type` in configurations of RoBERTas."""

# Transformers' names and those of the same weights of a BERT. The first that fits counts.
_PREFIXES = (
    ("classifier.dense.", "bert.pooler.dense."),
    ("classifier.out_proj.", "classifier."),
    ("roberta.", "bert."),
)
# The head of pretraining, and a pooler that the classifier does not read.
_OMITTED = ("lm_head.", "roberta.pooler.", "pooler.")
_WORDS = "bert.embeddings.word_embeddings.weight"
_POSITIONS = "bert.embeddings.position_embeddings.weight"


def roberta_names(names: Iterable[str]) -> set[str]:
    """Returns the names that weights of a BERT have in a RoBERTa.

    Example:
        >>> sorted(roberta_names(["classifier.bias", "bert.pooler.dense.bias"]))
        ['classifier.dense.bias', 'classifier.out_proj.bias']
    """
    return {
        next((old + name[len(new) :] for old, new in _PREFIXES if name.startswith(new)), name)
        for name in names
    }


def to_bert(weights: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """Converts the weights of a RoBERTa to those of a BERT with the same outputs.

    BERT's padding has the id 0 and its positions begin at 0. RoBERTa's first token has the position
    `padding + 1`, and no token has those before it.

    Args:
        weights: Arrays by name, as transformers saves them.
        padding: The id of the padding token, which exchanges it with the token of the id 0.
    """
    converted = {
        next((new + name[len(old) :] for old, new in _PREFIXES if name.startswith(old)), name): (
            array
        )
        for name, array in weights.items()
        if not name.startswith(_OMITTED)
    }
    # Names without the prefix are those of a file without a head.
    for name in (_POSITIONS, _POSITIONS.removeprefix("bert.")):
        if name in converted:
            converted[name] = converted[name][padding + 1 :]
    for name in (_WORDS, _WORDS.removeprefix("bert.")):
        if name in converted and converted[name].shape[0] > padding:
            words = np.array(converted[name])
            words[[0, padding]] = words[[padding, 0]]
            converted[name] = words
    return converted
