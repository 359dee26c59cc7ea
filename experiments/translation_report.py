"""What is told of translators: their scores, and these as a table, as sentences and as figures.

Every function is given rows, which `scores` and the script make, or sentences; none runs a network.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import plans
from jaxkd import figures, report
from jaxkd.checkpoints import write_atomically
from jaxkd.data.errors import require as require_package
from jaxkd.data.text import Pairs
from jaxkd.runs import Run

LENGTHS = (8, 10, 12, 15)
"""Words of a source sentence at which the groups end by whose quality is shown."""
DRAWN = 4
"""Sentences whose alignments are drawn."""
COMPARED = (("attention", "no_attention"), ("word_level", "attention"), ("sequence_level", "attention"))
"""Who is compared with whom, where both were trained."""

Row = Mapping[str, Any]
"""A translator's: name, what `scores` says, parameters, bytes, milliseconds a sentence and seconds of training."""


def scores(written: Sequence[Sequence[str]], pairs: Pairs) -> dict[str, Any]:
    """BLEU and chrF of translations, seed by seed, and BLEU of each group of lengths, `None` where a group is empty."""
    sacrebleu = require_package("sacrebleu")
    everything, groups = np.arange(len(pairs.targets)), by_length(pairs.sources)

    def score(metric: Any, one: Sequence[str], rows: np.ndarray) -> float | None:
        return metric([one[i] for i in rows], [[pairs.targets[i] for i in rows]]).score if len(rows) else None

    return {
        "bleu": [score(sacrebleu.corpus_bleu, one, everything) for one in written],
        "chrf": [score(sacrebleu.corpus_chrf, one, everything) for one in written],
        "bleu_by_length": [[score(sacrebleu.corpus_bleu, one, rows) for rows in groups] for one in written],
    }


def by_length(sources: Sequence[str]) -> list[np.ndarray]:
    """The numbers of the sentences of each group of lengths in words."""
    words = np.array([len(one.split()) for one in sources])
    ends = [0, *LENGTHS, np.inf]
    return [np.flatnonzero((words > low) & (words <= high)) for low, high in zip(ends, ends[1:], strict=False)]


def group_names() -> list[str]:
    """What the groups of lengths are called."""
    starts = [1, *(end + 1 for end in LENGTHS)]
    return [f"{low}–{high}" for low, high in zip(starts, LENGTHS, strict=False)] + [f"{starts[-1]}+"]


def table(rows: Sequence[Row]) -> str:
    """The table of results in Markdown, relative to the teacher if there is one."""
    teacher = next((np.mean(row["bleu"]) for row in rows if row["name"] == "teacher"), 0.0)
    columns = {
        "name": lambda row: row["name"],
        "BLEU": lambda row: plans.with_spread(row["bleu"]),
        "chrF": lambda row: plans.with_spread(row["chrf"]),
        "BLEU, % of the teacher's": lambda row: plans.with_spread(100 * np.array(row["bleu"]) / teacher),
        "parameters": lambda row: f"{row['parameters']:,}",
        "size": lambda row: f"{row['bytes'] / 1e6:.1f} MB",
        "ms a sentence": lambda row: f"{row['latency_ms']:.1f}",
        "training s": lambda row: f"{np.mean(row['seconds']):,.0f}",
    }
    if not teacher:
        del columns["BLEU, % of the teacher's"]
    return report.markdown_table([*columns], [[cell(row) for cell in columns.values()] for row in rows])


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the comparisons say."""
    found = {row["name"]: row for row in rows}
    told = []
    for name, other in COMPARED:
        if name in found and other in found:
            difference = np.array(found[name]["bleu"]) - np.array(found[other]["bleu"])
            told.append(f"{name} is {plans.with_spread(difference)} BLEU above {other}")
    if "attention" in found and "no_attention" in found:
        told += gaps(found["attention"], found["no_attention"])
    return told


def gaps(attention: Row, no_attention: Row) -> list[str]:
    """What attention is worth at each length, in BLEU and as a share."""
    aligned, blind = (np.array(row["bleu_by_length"], float) for row in (attention, no_attention))
    each = [f"{group} words {plans.with_spread(gap)}" for group, gap in named(aligned - blind)]
    means = zip(group_names(), blind.mean(0), aligned.mean(0), strict=True)
    shares = [f"{group} words {100 * low / high:.0f} %" for group, low, high in means if high > 0]
    return [
        f"attention above no_attention by length of the source: {', '.join(each)}",
        f"no_attention reaches this share of attention's BLEU: {', '.join(shares)}",
    ]


def named(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each group of lengths that has sentences, with its values, one a seed, of `[seeds, groups]`."""
    return [(name, one) for name, one in zip(group_names(), values.T, strict=True) if np.isfinite(one).all()]


def plot_lengths(rows: Sequence[Row], path: Path) -> None:
    """Draws quality against the length of the source."""
    with figures.draw(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for i, row in enumerate(rows):
            values = np.array(row["bleu_by_length"], float)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axes.errorbar(
                range(values.shape[1]), values.mean(0), spread, capsize=3, color=figures.COLOURS[i], label=row["name"]
            )
        axes.set_xticks(range(len(LENGTHS) + 1), group_names())
        axes.set(xlabel="words of the source", ylabel="BLEU")
        figure.legend(loc="outside lower center", ncols=3)


class Alignment(NamedTuple):
    """What a translator looked at as it wrote.

    Attributes:
        weights: `[T, S]`, a row for each of the target's tokens.
        target: The tokens it wrote, as a person reads them.
        source: Likewise those of the source.
    """

    weights: np.ndarray
    target: Sequence[str]
    source: Sequence[str]


def drawn(sources: Sequence[str]) -> list[int]:
    """The sentences whose alignments are drawn: the first ones of 8 to 14 words."""
    return [i for i, source in enumerate(sources) if 8 <= len(source.split()) <= 14][:DRAWN]


def plot_alignments(alignments: Sequence[Alignment], path: Path) -> None:
    """Draws which words of the source a translator looks at as it writes each word of its translation."""
    with figures.draw(path, 11, 9) as figure:
        for place, one in enumerate(alignments):
            axes = figure.add_subplot(2, 2, place + 1)
            axes.imshow(one.weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.grid(visible=False)
            axes.set_xticks(range(len(one.source)), one.source, rotation=90)
            axes.set_yticks(range(len(one.target)), one.target)


def write_translations(path: Path, pairs: Pairs, written: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Writes sources, references and the first seed's translations beside each other."""
    columns = [pairs.sources, pairs.targets, *(each[0] for each in written.values())]
    lines = ["\t".join(["source", "reference", *written]), *("\t".join(row) for row in zip(*columns, strict=True))]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_report(run: Run, rows: Sequence[Row]) -> None:
    """Writes report.md, with the figures that are in the folder."""
    settings = [[str(name), str(value)] for name, value in (run.config | run.environment).items()]
    captions = {
        "lengths.png": "BLEU against the length of the source",
        "alignments.png": "What the student looks at as it writes",
        "curves.png": "Validation loss and accuracy of words in training",
    }
    parts = [
        "# Translation",
        table(rows),
        "± is the standard deviation over seeds; BLEU and chrF are sacrebleu's on the test set.",
        "\n".join(f"- {one}" for one in sentences(rows)),
        *(f"![{caption}]({name})" for name, caption in captions.items() if (run.folder / name).is_file()),
        "## Settings and environment",
        report.markdown_table(["item", "value"], settings),
    ]
    write_atomically(run.folder / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())
