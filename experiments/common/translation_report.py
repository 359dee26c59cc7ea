"""Scores of translations, and their table, comparisons, figures and report.

Nothing here runs a network: rows of results and translations are computed before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd._files import write_atomically
from jaxkd.data.errors import import_or_raise
from jaxkd.data.parallel_text import Pairs
from jaxkd.runs import ResultRow, Run, figures, report
from jaxkd.runs.results import format_mean_and_std

GROUP_ENDS = (8, 10, 12, 15)
"""Largest number of words of the source in each group of lengths. A last group has the others."""
COMPARISONS = (
    ("attention", "no_attention"),
    ("word_level", "attention"),
    ("sequence_level", "attention"),
)
"""Pairs of a student and the baseline that the report compares it with, if both were trained."""
NUM_ALIGNED = 4
"""Number of sentences whose alignments are drawn."""


def score_translations(translations: Sequence[Sequence[str]], pairs: Pairs) -> dict[str, Any]:
    """Computes BLEU and chrF of the translations of each seed.

    Args:
        translations: For each seed, one translation per pair.
        pairs: The sources and the reference translations.

    Returns:
        `bleu` and `chrf`, one value per seed, and `bleu_by_length`, for each seed one value per
        group of lengths, `None` for an empty group.
    """
    sacrebleu = import_or_raise("sacrebleu")
    all_indices = np.arange(len(pairs.targets))
    groups = group_by_length(pairs.sources)

    def score(metric: Any, outputs: Sequence[str], indices: np.ndarray) -> float | None:
        if not len(indices):
            return None
        references = [pairs.targets[i] for i in indices]
        return metric([outputs[i] for i in indices], [references]).score

    bleu = sacrebleu.corpus_bleu
    chrf = sacrebleu.corpus_chrf
    return {
        "bleu": [score(bleu, outputs, all_indices) for outputs in translations],
        "chrf": [score(chrf, outputs, all_indices) for outputs in translations],
        "bleu_by_length": [
            [score(bleu, outputs, indices) for indices in groups] for outputs in translations
        ],
    }


def group_by_length(sources: Sequence[str]) -> list[np.ndarray]:
    """Returns the indices of the sentences in each group of lengths."""
    num_words = np.array([len(source.split()) for source in sources])
    ends = [0, *GROUP_ENDS, np.inf]
    return [
        np.flatnonzero((num_words > low) & (num_words <= high))
        for low, high in zip(ends, ends[1:], strict=False)
    ]


def group_names() -> list[str]:
    """Returns the name of each group of lengths, such as "9–10"."""
    starts = [1, *(end + 1 for end in GROUP_ENDS)]
    names = [f"{start}–{end}" for start, end in zip(starts, GROUP_ENDS, strict=False)]
    return [*names, f"{starts[-1]}+"]


def make_table(rows: Sequence[ResultRow]) -> str:
    """Formats the table of results in Markdown, relative to the teacher if there is one."""
    teacher_bleu = [np.mean(row.extra["bleu"]) for row in rows if row.name == "teacher"]
    columns = {
        "name": lambda row: row.name,
        "BLEU": lambda row: format_mean_and_std(row.extra["bleu"]),
        "chrF": lambda row: format_mean_and_std(row.extra["chrf"]),
        "BLEU, % of the teacher's": lambda row: format_mean_and_std(
            100 * np.array(row.extra["bleu"]) / teacher_bleu[0]
        ),
        "parameters": lambda row: f"{row.parameters:,}",
        "size": lambda row: f"{row.bytes / 1e6:.1f} MB",
        "ms per sentence": lambda row: f"{row.latency_ms:.1f}",
        "training s": lambda row: f"{np.mean(row.seconds):,.0f}",
    }
    # A teacher whose BLEU is 0 cannot be divided by.
    if not any(teacher_bleu):
        del columns["BLEU, % of the teacher's"]
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return report.markdown_table(list(columns), cells)


def describe_comparisons(rows: Sequence[ResultRow]) -> list[str]:
    """Describes the differences in BLEU between students, and the gain of attention by length."""
    by_name = {row.name: row for row in rows}
    sentences = []
    for name, baseline in COMPARISONS:
        if name in by_name and baseline in by_name:
            difference = np.subtract(by_name[name].extra["bleu"], by_name[baseline].extra["bleu"])
            side = "above" if difference.mean() >= 0 else "below"
            size = format_mean_and_std(difference if side == "above" else -difference)
            sentences.append(f"{name} is {size} BLEU {side} {baseline}")
    if "attention" in by_name and "no_attention" in by_name:
        sentences += _describe_attention(by_name["attention"], by_name["no_attention"])
    return sentences


def _describe_attention(attention: ResultRow, no_attention: ResultRow) -> list[str]:
    """Describes the gain of attention at each length, in BLEU and as a share."""
    # The BLEU of an empty group is None, which becomes NaN.
    with_attention = np.array(attention.extra["bleu_by_length"], float)
    without = np.array(no_attention.extra["bleu_by_length"], float)
    gains = [
        f"{name} words {format_mean_and_std(values)}"
        for name, values in zip(group_names(), (with_attention - without).T, strict=True)
        if np.isfinite(values).all()
    ]
    means = zip(group_names(), without.mean(0), with_attention.mean(0), strict=True)
    shares = [f"{name} words {100 * low / high:.0f} %" for name, low, high in means if high > 0]
    sentences = [f"attention above no_attention by length of the source: {', '.join(gains)}"]
    if shares:
        sentences.append(
            f"no_attention reaches this share of attention's BLEU: {', '.join(shares)}"
        )
    return sentences


def plot_lengths(rows: Sequence[ResultRow], path: Path) -> None:
    """Draws BLEU against the length of the source: mean and standard deviation over seeds."""
    with figures.new_figure(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for row, colour in zip(rows, figures.COLOURS, strict=False):
            values = np.array(row.extra["bleu_by_length"], float)
            mean = values.mean(0)
            std = values.std(0, ddof=1) if len(values) > 1 else None
            axes.errorbar(range(len(mean)), mean, std, capsize=3, color=colour, label=row.name)
        axes.set_xticks(range(len(GROUP_ENDS) + 1), group_names())
        axes.set(xlabel="words of the source", ylabel="BLEU")
        figure.legend(loc="outside lower center", ncols=3)


class Alignment(NamedTuple):
    """The attention of a translator to the source as it writes.

    Attributes:
        weights: `[T, S]`, a row for each token of the target.
        target: The texts of the T tokens that it wrote.
        source: The texts of the S tokens of the source.
    """

    weights: np.ndarray
    target: Sequence[str]
    source: Sequence[str]


def select_aligned(sources: Sequence[str]) -> list[int]:
    """Returns the indices of the sentences to draw alignments of: the first of 8 to 14 words."""
    indices = [i for i, source in enumerate(sources) if 8 <= len(source.split()) <= 14]
    return indices[:NUM_ALIGNED]


def plot_alignments(alignments: Sequence[Alignment], path: Path) -> None:
    """Draws the attention to each token of the source, for each token of the translation."""
    with figures.new_figure(path, 11, 9) as figure:
        for index, alignment in enumerate(alignments):
            axes = figure.add_subplot(2, 2, index + 1)
            axes.imshow(alignment.weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.grid(visible=False)
            source, target = (
                [figures.plain_text(token) for token in tokens]
                for tokens in (alignment.source, alignment.target)
            )
            axes.set_xticks(range(len(source)), source, rotation=90)
            axes.set_yticks(range(len(target)), target)


def write_translations(
    path: Path, pairs: Pairs, translations: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Writes a table, separated by tabs, of sources, references and first seed's translations.

    Args:
        path: The file.
        pairs: The sources and the references.
        translations: For each translator and each of its seeds, one translation per pair.
    """
    first_seeds = [seeds[0] for seeds in translations.values()]
    header = ["source", "reference", *translations]
    rows = zip(pairs.sources, pairs.targets, *first_seeds, strict=True)
    lines = ["\t".join(row) for row in (header, *rows)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_report(run: Run, rows: Sequence[ResultRow]) -> None:
    """Writes report.md into the run's folder, and its figures but that of the alignments."""
    plot_lengths(rows, run.folder / "lengths.png")
    figures.plot_curves(run.metrics(), run.folder / "curves.png", names=[row.name for row in rows])
    captions = {
        "lengths.png": "BLEU against the length of the source",
        "alignments.png": "Attention of the student to the source for each token that it writes",
        "curves.png": "Validation loss and accuracy of words in training",
    }
    # Only students with attention have alignments.
    shown = [name for name in captions if (run.folder / name).is_file()]
    settings = [[name, str(value)] for name, value in (run.config | run.environment).items()]
    paragraphs = [
        "# Translation",
        make_table(rows),
        "± is the standard deviation over seeds; BLEU and chrF are sacrebleu's on the test set.",
        "\n".join(f"- {sentence}" for sentence in describe_comparisons(rows)),
        *(f"![{captions[name]}]({name})" for name in shown),
        "## Settings and environment",
        report.markdown_table(["item", "value"], settings),
    ]
    # There may be nothing to compare.
    text = "\n\n".join(filter(None, paragraphs)) + "\n"
    write_atomically(run.folder / "report.md", text.encode())


def print_summary(rows: Sequence[ResultRow]) -> None:
    """Prints the table and the comparisons."""
    print(make_table(rows))
    for sentence in describe_comparisons(rows):
        print(sentence)
