"""Markdown tables of the results, as the page shows them."""

from collections.abc import Iterable, Sequence

from experiments.benchmarks.step_cost.communication import MESH, MODEL_MESH, PMAP
from experiments.benchmarks.step_cost.machines import MACHINES
from experiments.benchmarks.step_cost.pairs import PAIRS, TINY_PAIRS

TITLES = {name: pair.title for name, pair in (*TINY_PAIRS.items(), *PAIRS.items())}
PARTS = {
    "teacher": "teacher, forward",
    "student": "student, forward and backward",
    "loss": "loss and its gradient",
    "optimizer": "optimizer",
    "input": "input, from device memory",
}


def make_tables(results: dict) -> dict[str, str]:
    """Makes all tables of the results that have rows, by name."""
    communication = results["communication"]
    made = {
        "parts": make_parts_table(results["parts"]),
        "placements": make_placements_table(communication),
        "scaling": make_scaling_table(communication),
        "processes": make_processes_table(communication),
        "machines": make_machines_table(),
        "bounds": make_bounds_table(results["bounds"]),
    }
    return {name: table for name, table in made.items() if table.count("\n") > 1}


def make_parts_table(rows: Iterable[dict]) -> str:
    """Makes the table of FLOPs and bytes of each part of a step."""
    lines = []
    for row in rows:
        paper, xla = row["paper"], row.get("xla")
        # XLA counts one iteration of a loop, so that only this much can agree.
        counted = paper["flops"] - row.get("repeated", 0)
        lines.append(
            (
                f"{TITLES[row['pair']]}, {row['batch']}",
                PARTS[row["part"]],
                _si(paper["flops"]),
                _si(xla["flops"]) if xla else "",
                f"{xla['flops'] / counted:.2f}" if xla and counted else "",
                _si(paper["bytes"]),
                _si(xla["bytes"]) if xla else "",
                f"{xla['bytes'] / paper['bytes']:.1f}" if xla else "",
            )
        )
    titles = ("pair, batch", "part", "FLOPs", "XLA", "ratio", "bytes", "XLA", "ratio")
    return _table(titles, lines, text_columns=2)


def make_placements_table(rows: Iterable[dict]) -> str:
    """Makes the table of what each placement communicates on the largest number of devices."""
    rows = [row for row in rows if row["processes"] == 1]
    largest = max(row["devices"] for row in rows)
    strong = {pair: max(r["batch"] for r in rows if r["pair"] == pair) for pair in _pairs(rows)}
    lines = [
        (
            f"{TITLES[row['pair']]}, {row['batch']}",
            row["placement"],
            ", ".join(
                f"{kind} {_si(sums['payload'], 'B')} in {sums['operations']:.0f}"
                for kind, sums in row["compiled"].items()
            )
            or "nothing",
            _si(row["compiled_sent"]),
            # Which weights of the teacher are joined, and which products divided, is XLA's choice.
            "({})".format(_si(row["paper_sent"]))
            if row["placement"] == MODEL_MESH
            else _si(row["paper_sent"]),
        )
        for row in rows
        if row["devices"] == largest and row["batch"] == strong[row["pair"]]
    ]
    titles = ("pair, batch", "placement", "collectives", "sent", "formula")
    return _table(titles, lines, text_columns=3)


def make_scaling_table(rows: Sequence[dict]) -> str:
    """Makes the table of what a device sends with strong and with weak scaling."""
    rows = [row for row in rows if row["processes"] == 1 and row["placement"] in (MESH, PMAP)]
    counts = sorted({row["devices"] for row in rows if row["devices"] > 1})
    lines = []
    for pair in _pairs(rows):
        for placement in (MESH, PMAP):
            found = [row for row in rows if (row["pair"], row["placement"]) == (pair, placement)]
            strong = max(row["batch"] for row in found)
            for scaling in ("strong", "weak") if counts else ():
                cells = []
                for count in counts:
                    batches = [row for row in found if row["devices"] == count]
                    choose = max if scaling == "strong" else min
                    row = choose(batches, key=lambda row: row["batch"])
                    cells.append(f"{_si(row['compiled_sent'])} ({_si(row['paper_sent'])})")
                batch = f"{strong}" if scaling == "strong" else f"{strong // counts[-1]} a device"
                lines.append((TITLES[pair], placement, f"{scaling}, {batch}", *cells))
    titles = ("pair", "placement", "batch", *(f"{count} devices" for count in counts))
    return _table(titles, lines, text_columns=3)


def make_processes_table(rows: Sequence[dict]) -> str:
    """Makes the table of what a device sends within one process and between several."""
    several = [row for row in rows if row["processes"] > 1]
    lines = []
    for row in several:
        key = ("pair", "placement", "devices", "batch")
        in_one_process = (r for r in rows if r["processes"] == 1)
        same = (r for r in in_one_process if all(r[k] == row[k] for k in key))
        reference = next(same, None)
        lines.append(
            (
                f"{TITLES[row['pair']]}, {row['batch']}",
                row["placement"],
                str(row["devices"]),
                _si(reference["compiled_sent"]) if reference else "",
                _si(row["compiled_sent"]),
            )
        )
    titles = ("pair, batch", "placement", "devices", "one process", "a process each")
    return _table(titles, lines, text_columns=2)


def make_machines_table() -> str:
    """Makes the table of the machines' peak rates."""
    lines = [
        (
            machine.title,
            f"{machine.flops / 1e12:.0f}",
            f"{machine.memory / 1e9:,.0f}",
            f"{machine.links / 1e9:.0f}",
            f"{machine.host / 1e9:.0f}",
            ", ".join(f"[{i}]({url})" for i, url in enumerate(machine.sources, start=1)),
        )
        for machine in MACHINES
    ]
    titles = ("machine", "TFLOP/s in bf16", "memory, GB/s", "links, GB/s", "host, GB/s", "sources")
    return _table(titles, lines, text_columns=1)


def make_bounds_table(rows: Iterable[dict]) -> str:
    """Makes the table of what bounds a step on each machine."""
    lines = []
    for row in rows:
        lines_of = row["lines"]
        per_example = (f"{_round(1e9 * line['per_example'])}" for line in lines_of.values())
        fixed = (f"{_round(1e6 * lines_of[name]['fixed'])}" for name in ("memory", "links"))
        regimes = (_regimes(bounds) for bounds in row["bounds"].values())
        lines.append((row["machine"], TITLES[row["pair"]], *per_example, *fixed, *regimes))
    titles = (
        *("machine", "pair", "compute, ns", "memory, ns", "links, ns", "of pmap, ns", "input, ns"),
        *("memory, µs", "links, µs", "mesh", "pmap", "streamed"),
    )
    return _table(titles, lines, text_columns=2)


def _pairs(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(row["pair"] for row in rows))


def _regimes(bounds: Sequence[Sequence]) -> str:
    first, *others = bounds
    return "; ".join([first[1], *(f"{name} from {batch:,}" for batch, name in others)])


def _round(number: float) -> str:
    """Rounds a number to three digits, without an exponent."""
    return f"{float(f'{number:.3g}'):,g}"


def _si(number: float, unit: str = "") -> str:
    """Formats a number with three digits and a prefix: 1.23 G."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # As 999.6 would be rounded to 1000.
        if number >= 0.9995 * factor:
            return f"{number / factor:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    rules = [":--"] * text_columns + ["--:"] * (len(titles) - text_columns)
    header = [f"| {' | '.join(titles)} |", f"|{'|'.join(rules)}|"]
    return "\n".join(header + [f"| {' | '.join(row)} |" for row in rows])
