"""Tests that what the documentation names exists: figures, functions, messages, results, arrows."""

import ast
import functools
import importlib
import json
import re
from pathlib import Path

import pytest

import jaxkd
from jaxkd.runs import ResultRow
from jaxkd.runs.results import COLUMNS, format_mean_and_std

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
}


# Figures


FIGURES = sorted(
    {
        (page, link)
        for page, text in PAGES.items()
        for link in re.findall(r"!\[.*?\]\((.*?)\)", text)
    }
)


@pytest.mark.parametrize(("page", "link"), FIGURES)
def test_figure_exists(page, link):
    path = (DOCS / page).parent / link
    if link.endswith(".svg"):
        assert "<svg" in path.read_text(encoding="utf-8")
        return
    # The hook in docs/_hooks.py makes `figures/` of the recorded figures.
    assert path.resolve().parent == DOCS / "figures"
    figure = ROOT / "experiments" / "results" / path.name
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_every_recorded_figure_is_shown():
    recorded = {path.name for path in (ROOT / "experiments" / "results").glob("*.png")}
    assert recorded == {Path(link).name for _, link in FIGURES if link.endswith(".png")}


# Names


PUBLIC = (
    "attention",
    "data",
    "decode",
    "distill",
    "evaluate",
    "layout",
    "losses",
    "models",
    "runs",
    "transfer",
    "weights",
)
# Modules that the pages import by their last name, such as `from jaxkd.runs import report`.
SUBMODULES = {
    "bucketing": "jaxkd.data.bucketing",
    "checkpoints": "jaxkd.runs.checkpoints",
    "hub": "jaxkd.weights.hub",
    "parallel_text": "jaxkd.data.parallel_text",
    "report": "jaxkd.runs.report",
    "teacher_cache": "jaxkd.distill.teacher_cache",
    "text": "jaxkd.data.text",
    "tokens": "jaxkd.data.tokens",
    "verify": "jaxkd.runs.verify",
    "views": "jaxkd.data.views",
}
MODULES = {name: f"jaxkd.{name}" for name in PUBLIC} | SUBMODULES
FILE_ENDINGS = {"md", "py", "json", "jsonl", "png", "svg"}
NAME = re.compile(rf"\b(?:jaxkd\.)?({'|'.join(MODULES)})((?:\.[A-Za-z_]\w*)+)")


def named_in(text):
    """Returns the dotted names of the library in inline code, such as `losses.kl_divergence`."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    names = set()
    for code in re.findall(r"`([^`\n]+)`", prose):
        # Not `config.json`, nor a path such as `jaxkd/runs/report.py`.
        for match in NAME.finditer(re.sub(r"\S*/\S*", "", code)):
            if match[2].rsplit(".", 1)[1] not in FILE_ENDINGS:
                names.add((match[1], match[2]))
    return names


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    missing = []
    for module, attributes in sorted(named_in(PAGES[page])):
        try:
            value = importlib.import_module(MODULES[module])
            for attribute in attributes.split(".")[1:]:
                value = find_attribute(value, attribute)
        except (AttributeError, ImportError):
            missing.append(module + attributes)
    assert not missing


def find_attribute(value, name):
    """Returns an attribute, or a submodule that nobody has imported yet."""
    if not hasattr(value, name) and hasattr(value, "__path__"):
        return importlib.import_module(f"{value.__name__}.{name}")
    # A field of a dataclass without a default is not an attribute of the class.
    return (
        value.__annotations__[name]
        if name in getattr(value, "__annotations__", ())
        else getattr(value, name)
    )


def test_a_wrong_name_is_noticed():
    assert named_in("see `losses.no_such_loss(1)` and `report.md`") == {("losses", ".no_such_loss")}
    with pytest.raises((AttributeError, ImportError)):
        find_attribute(importlib.import_module("jaxkd.losses"), "no_such_loss")


def public_names(module):
    """Returns the names that a page of the API must show."""
    module = importlib.import_module(module)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in defined if not name.startswith("_")}


@pytest.mark.parametrize("package", PUBLIC)
def test_api_page_shows_every_public_name(package):
    page = PAGES[f"api/{package}.md"]
    shown = re.findall(rf"^::: jaxkd\.{package}\.(\w+)$", page, re.M)
    assert len(shown) == len(set(shown))
    assert set(shown) == public_names(f"jaxkd.{package}")


# Messages


@functools.cache
def messages():
    """Returns the string literals of the code, with a gap for each value that is filled in."""
    texts = []
    for folder in ("jaxkd", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        str(part.value) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    ]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


TROUBLES = [
    message
    for message in re.findall(
        r"^\| `([^`]+)`(?: \(a warning\))? \|", PAGES["guides/troubleshooting.md"], re.M
    )
]


@pytest.mark.parametrize("message", TROUBLES)
def test_message_is_in_the_code(message):
    # In code, backticks of a message are quoted by a value, and "…" is one that is filled in.
    fragments = [fragment.strip() for fragment in message.split("…")]
    pattern = re.compile(".*".join(map(re.escape, fragments)), re.S)
    assert any(pattern.search(text.replace("`", "")) for text in messages())


# Results


TABLE = re.compile(r"^<!-- from: (.*?) -->\n((?:\|.*\n)+)", re.M)
TABLES = [
    (page, match[1], match[2]) for page, text in PAGES.items() for match in TABLE.finditer(text)
]


def read_table(lines):
    """Returns the rows of a Markdown table as dicts."""
    titles, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()
    ]
    return [dict(zip(titles, row, strict=True)) for row in rows]


def numbers(cell):
    return [float(number) for number in re.findall(r"\d+\.?\d*", cell.replace(",", ""))]


@pytest.mark.parametrize(("page", "file", "lines"), TABLES, ids=lambda value: value[:60])
def test_table_is_the_recorded_one(page, file, lines):
    recorded = {row["name"]: row for row in json.loads((ROOT / file).read_text(encoding="utf-8"))}
    shown = read_table(lines)
    assert {row["name"] for row in shown} == set(recorded)
    columns = {column.title: column.cell for column in COLUMNS}
    for row in shown:
        record = recorded[row["name"]]
        result = ResultRow.from_json(record)
        compared = 0
        for title, cell in row.items():
            if title == "accuracy %":
                # A tie, such as 86.55, may be rounded either way.
                exact = [result.accuracy_mean, result.accuracy_std]
                exact = [100 * value for value in exact if value is not None]
                assert numbers(cell) == pytest.approx(exact, abs=0.050001)
            elif title in ("BLEU", "chrF"):
                assert cell == format_mean_and_std(record[title.lower()])
            elif title in columns and title != "name":
                assert cell == columns[title](result)
            else:
                continue
            compared += 1
        assert compared >= 3


def test_every_recorded_row_is_in_a_table():
    recorded = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "experiments" / "results").glob("*.json")
        if isinstance(json.loads(path.read_text(encoding="utf-8")), list)
    }
    # The table of this file has lengths as columns.
    recorded.remove("experiments/results/translation_attention.json")
    assert recorded == {file for _, file, _ in TABLES}


def test_memory_of_the_fused_losses_is_the_recorded_one():
    (lines,) = re.findall(
        r"^<!-- memory from: .*? -->\n((?:\|.*\n)+)", PAGES["results/speed.md"], re.M
    )
    benchmark = json.loads((ROOT / "experiments/results/loss_benchmark.json").read_text("utf-8"))
    names = {
        "KL": "linear_kl_divergence",
        "reverse KL": "linear_reverse_kl_divergence",
        "Jensen–Shannon": "linear_jensen_shannon_divergence",
    }
    recorded = {
        (row["loss"], row["implementation"], row["dtype"]): row["bytes"] / 1e9
        for row in benchmark["full_size_memory"]
    }
    for row in read_table(lines):
        for title, cell in row.items():
            if title == "loss":
                continue
            kind, dtype = title.split(", ")
            implementation = "jaxkd" if kind == "plain" else "fused"
            (shown,) = numbers(cell)
            assert shown == pytest.approx(
                recorded[names[row["loss"]], implementation, dtype], abs=0.05
            )


# The diagram


def reachable(arrows):
    """Returns the pairs of packages that a path of arrows connects."""

    def below(name):
        return set().union(*({other} | below(other) for other in arrows.get(name, ())))

    return {(name, other) for name in arrows for other in below(name)}


def test_diagram_has_the_arrows_that_the_tests_hold():
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    (table,) = (
        ast.literal_eval(ast.unparse(node.value).replace("set()", "()"))
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ARROWS"
    )
    hidden = {"_cpu_flags", "_extras", "_files", "_images", "_messages", "__main__"}
    held = {name: set(used) - hidden for name, used in table.items() if name not in hidden}
    drawn = {name: set() for name in held}
    diagram = (DOCS / "assets" / "packages.svg").read_text(encoding="utf-8")
    for source, target in re.findall(r'data-arrow="(\w+) (\w+)"', diagram):
        drawn[source].add(target)
    assert reachable(drawn) == reachable(held)


def test_tree_lists_every_part():
    (tree,) = re.findall(r"^```text\n(jaxkd/\n.*?)```", PAGES["how_it_works.md"], re.M | re.S)
    package = Path(jaxkd.__file__).parent
    parts = {path.name for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts -= {"__init__.py", "__main__.py", "__pycache__"}
    parts |= {path.name for path in (package / "distill").glob("*.py")} - {"__init__.py"}
    assert not [part for part in sorted(parts) if part not in tree]
