"""Tests that the catalogue lists every public function and agrees with its docstring.

The experiments that it names must use the functions for which they are named.
"""

import inspect
import re
from pathlib import Path

import pytest

from jaxkd import attention, layout, losses

PAGE = Path(__file__).parents[1] / "docs" / "api" / "catalogue.md"
ROWS = {
    name: cells
    for name, *cells in re.findall(
        r"^\| \[`(\w+)`\]\(.*?\) \| (.*?) \| (.*?) ?\| (.*?) ?\| (.*?) \|$",
        PAGE.read_text("utf-8"),
        re.M,
    )
}


def public(module):
    """Returns the public objects that a module defines, rather than imports, by name."""
    if module is losses:
        return {name: getattr(losses, name) for name in losses.__all__}
    defined = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in defined.items()
        if getattr(value, "__module__", None) == module.__name__
    }


FUNCTIONS = {
    name: value for module in (losses, attention, layout) for name, value in public(module).items()
}


def test_lists_every_function_once():
    listed = re.findall(r"^\| \[`(\w+)`\]", PAGE.read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(FUNCTIONS)
    assert set(ROWS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_repeats_the_docstring(name):
    summary, formula, papers, used_for = ROWS[name]
    text = " ".join(inspect.getdoc(FUNCTIONS[name]).split())
    assert summary and " ".join(summary.replace("\\|", "|").split()) in text
    assert " ".join(formula.replace("\\|", "|").split()) in text
    assert set(re.findall(r"\((https?://[^)]*)\)", papers)) == set(
        re.findall(r"https?://[^\s,]+", text)
    )
    assert used_for


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FUNCTIONS
        if name.endswith(("_loss", "_divergence", "_entropy", "_distance"))
    ],
)
def test_every_loss_has_a_formula(name):
    assert ROWS[name][1]


EXPERIMENTS = [
    (name, experiment)
    for name, row in ROWS.items()
    for experiment in re.findall(r"`experiments\.([\w.]+)`", row[3])
]


@pytest.mark.parametrize(("name", "experiment"), EXPERIMENTS)
def test_experiments_use_the_functions_for_which_they_are_named(name, experiment):
    source = PAGE.parents[2] / "experiments" / f"{experiment.replace('.', '/')}.py"
    assert re.search(rf"\b{name}\b", source.read_text("utf-8"))
