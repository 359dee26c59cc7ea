"""Translation by beam search, and what is measured with it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from experiments.common import translation_report
from experiments.common.translation_data import (
    TranslationData,
    encode_pairs,
    padded_batches,
)
from jaxkd import decode, distill, evaluate, runs
from jaxkd.data import tokens
from jaxkd.data.bucketing import LengthBuckets, token_lengths
from jaxkd.data.parallel_text import Pairs
from jaxkd.data.progress import track
from jaxkd.models import Model, seq2seq
from jaxkd.runs import checkpoints

LATENCY_BATCH = 128
"""Largest number of sentences that are translated together to time them."""
LATENCY_REPEATS = 5
"""Number of times that they are translated."""

TranslateFn = Callable[[dict, np.ndarray], np.ndarray]
"""`(variables, sources [N, S]) -> translations [N, max_length]`, tokens without the start token."""


def make_translate(
    module: Any,
    buckets: LengthBuckets,
    *,
    beams: int,
    max_length: int,
    length_penalty: float,
) -> TranslateFn:
    """Makes the function that translates sources by beam search.

    Args:
        module: The translator.
        buckets: The lengths to which the sources are cut. Each is compiled.
        beams: Number of prefixes that the search keeps.
        max_length: Number of tokens of the longest translation.
        length_penalty: Exponent of the search's length penalty.
    """
    decoder = seq2seq.make_decoder(module)

    @jax.jit
    def search(variables: dict, sources: Array) -> Array:
        result = decode.beam_search(
            functools.partial(decoder.step, variables),
            decoder.init_state(variables, sources, max_length),
            beams=beams,
            max_length=max_length,
            length_penalty=length_penalty,
        )
        return result.tokens[:, 0]

    def translate(variables: dict, sources: np.ndarray) -> np.ndarray:
        translations = np.zeros((len(sources), max_length), np.int32)
        batches = list(padded_batches(sources, buckets))
        for rows, batch in track(batches, description="translating", total=len(batches)):
            # The rows after these are the padding of the last batch.
            translations[rows] = np.asarray(search(variables, batch))[: len(rows)]
        return translations

    return translate


def translate_train_pairs(
    run: runs.Run, data: TranslationData, variables: dict, translate: TranslateFn, *, beams: int
) -> np.ndarray:
    """Returns the training pairs with a teacher's translations as their targets.

    They are saved in the run's folder and read from there the next time, with the same options.

    Args:
        run: The run.
        data: The pairs.
        variables: The teacher's variables.
        translate: The teacher's function from `make_translate`.
        beams: Its number of beams.

    Returns:
        int32 `[N, 2, S]`.
    """
    folder = run.folder / "translations"
    sources = data.train[:, 0]
    notes = {
        "weights": runs.fingerprint(jax.tree.leaves(jax.device_get(variables))),
        "sources": runs.fingerprint([data.train]),
        "beams": beams,
        # The search has further options, with which a run may have grown.
        "options": {n: value for n, value in run.config.items() if n not in runs.UNTRAINED_OPTIONS},
    }
    saved = checkpoints.load(folder)
    if saved is not None and saved.notes == notes:
        return saved.tree["pairs"]
    translations = translate(variables, sources)
    # A target begins with the start token, which the search does not return.
    start_token = data.train[0, 1, 0]
    targets = np.pad(translations, ((0, 0), (1, 0)), constant_values=start_token)
    pairs = np.stack([sources, targets[:, : sources.shape[1]]], axis=1)
    if distill.is_primary_process():
        checkpoints.save(folder, 0, {"pairs": pairs}, notes=notes)
    return pairs


def measure(
    name: str,
    trained: Sequence[distill.TrainedModel],
    translate: TranslateFn,
    data: TranslationData,
) -> tuple[runs.ResultRow, list[list[str]]]:
    """Translates the test set and scores the translations.

    Args:
        name: Name of the translator.
        trained: Its trained models, one per seed.
        translate: Its function from `make_translate`.
        data: The pairs.

    Returns:
        The row of results, and the translations of each seed.
    """
    translations = [
        tokens.decode(data.tokenizer, translate(model.variables, data.sources)) for model in trained
    ]
    variables = trained[0].variables
    row = runs.ResultRow(
        name,
        parameters=evaluate.parameter_count(variables),
        bytes=evaluate.parameter_bytes(variables),
        latency_ms=measure_latency(translate, variables, data.sources),
        seconds=tuple(model.seconds for model in trained),
        extra=translation_report.score_translations(translations, data.pairs.test),
    )
    return row, translations


def measure_latency(translate: TranslateFn, variables: dict, sources: np.ndarray) -> float:
    """Measures the milliseconds per sentence, in a batch of sentences of medium length."""
    by_length = sources[np.argsort(token_lengths(sources))]
    batch = by_length[len(sources) // 2 :][:LATENCY_BATCH]
    times = evaluate.time_calls(lambda: translate(variables, batch), repeats=LATENCY_REPEATS)
    return float(np.median(times)) / len(batch)


def compute_alignments(
    model: Model, variables: dict, data: TranslationData, translations: Sequence[str]
) -> list[translation_report.Alignment]:
    """Computes the attention weights of some translations of the test set.

    Args:
        model: A translator with attention.
        variables: Its variables.
        data: The pairs.
        translations: Its translations of the test set.
    """
    test = data.pairs.test
    max_length = data.sources.shape[1]
    alignments = []
    for index in translation_report.select_aligned(test.sources):
        # A translation may be empty, which cannot be encoded.
        target = translations[index] or "?"
        pair = Pairs((test.sources[index],), (target,), (test.origins[index],))
        inputs = encode_pairs(data.tokenizer, pair, max_length=max_length)
        if not len(inputs):  # a sentence is longer than that
            continue
        outputs, _ = model.apply(variables, inputs, train=False)
        source_tokens, target_tokens = (
            [token_text(data.tokenizer, token_id) for token_id in row[row != 0]]
            for row in inputs[0]
        )
        # Row t has the weights that led to the token t + 1: the start token has none.
        target_tokens = target_tokens[1:]
        weights = np.asarray(outputs.features["alignment"])
        weights = weights[0, : len(target_tokens), : len(source_tokens)]
        alignments.append(translation_report.Alignment(weights, target_tokens, source_tokens))
    return alignments


def token_text(tokenizer: Any, token_id: np.integer) -> str:
    """Returns the text of a token, or its name for a special token."""
    return tokenizer.decode([int(token_id)]).strip() or tokenizer.id_to_token(int(token_id))
