"""The allowed imports between modules, and how little `import jaxkd.losses` loads."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkd

PACKAGE = Path(jaxkd.__file__).parent

# The packages and modules that each one may import. A module that is not listed here fails, so that
# a new arrow is a decision.
ARROWS = {
    "_files": {"_messages"},
    "_cpu_flags": set(),
    "_images": set(),
    "_messages": set(),
    "_extras": {"_messages"},
    "attention": set(),
    "layout": set(),
    "decode": set(),
    "losses": {"_messages", "attention"},
    "transfer": {"_messages", "layout"},
    "models": {"_extras", "_messages", "_images", "attention", "layout", "transfer"},
    "data": {"_messages", "_extras", "_images"},
    "evaluate": {"_images", "_messages", "data", "losses", "models"},
    "weights": {"_messages", "_extras", "_files", "data", "models", "transfer"},
    "runs": {"_messages", "_extras", "_files", "evaluate", "models"},
    "distill": {
        "_cpu_flags",
        "_messages",
        "_extras",
        "_files",
        "_images",
        "data",
        "evaluate",
        "losses",
        "models",
        "runs",
        "weights",
    },
    "cli": {
        "_cpu_flags",
        "_extras",
        "_files",
        "_messages",
        "data",
        "distill",
        "losses",
        "models",
        "runs",
        "transfer",
        "weights",
    },
    "__main__": {"cli"},
}

# The same within `jaxkd.distill`, from the command's end to the gradient.
DISTILL_ARROWS = {
    "selection": set(),
    "_cached_outputs": set(),
    "_rewrite": set(),
    "step": {"_cached_outputs", "_rewrite", "selection"},
    "methods": {"step", "terms"},
    "terms": {"step"},
    "schemes": {"_lowering", "plan", "step"},
    "_multi_step": set(),
    "_relay": set(),
    "_fate": {"_relay"},
    "distributed": {"_fate"},
    "placement": {"_multi_step", "distributed", "step"},
    "_save_clock": {"distributed"},
    "_requirements": {"_cached_outputs", "selection"},
    "plan": {"_cached_outputs", "_requirements", "_rewrite", "selection", "step"},
    "teacher_cache": {"_cached_outputs"},
    "_batches": {"step"},
    "_diagnosis": {"_requirements"},
    "_input_checks": {"_diagnosis", "_requirements", "plan"},
    "_stream": {"_batches", "_requirements", "placement", "plan", "step"},
    "_lowering": {"_cached_outputs", "placement", "plan", "step"},
    "_compile": {
        "_cached_outputs",
        "_diagnosis",
        "_lowering",
        "_multi_step",
        "placement",
        "plan",
        "step",
    },
    "_schedule": {"_compile", "_requirements", "plan"},
    "_progress": {"distributed", "plan"},
    "_validation": {"_diagnosis", "plan", "selection"},
    "_identity": set(),
    "_restore": {"_identity", "step"},
    "_stage_run": {
        "_compile",
        "_diagnosis",
        "_identity",
        "_restore",
        "distributed",
        "plan",
        "step",
    },
    "_best": {"_stage_run"},
    "_metric_buffer": {"_multi_step", "placement"},
    "_derived": {"_diagnosis", "_lowering", "_stage_run", "_validation", "plan"},
    "_loop": {
        "_best",
        "_batches",
        "_diagnosis",
        "_metric_buffer",
        "_requirements",
        "_save_clock",
        "_stage_run",
        "_stream",
        "_validation",
        "distributed",
        "placement",
        "plan",
        "step",
        "teacher_cache",
    },
    "_measurements": {
        "_cached_outputs",
        "_identity",
        "_lowering",
        "_stage_run",
        "distributed",
        "plan",
    },
    "_trainer": {
        "_batches",
        "_compile",
        "_derived",
        "_identity",
        "_loop",
        "_progress",
        "_schedule",
        "_stage_run",
        "_validation",
        "distributed",
        "placement",
    },
    "runner": {
        "_compile",
        "_derived",
        "_diagnosis",
        "_identity",
        "_input_checks",
        "_loop",
        "_measurements",
        "_progress",
        "_requirements",
        "_schedule",
        "_stage_run",
        "_stream",
        "_trainer",
        "_validation",
        "distributed",
        "placement",
        "plan",
        "teacher_cache",
    },
    "outputs": {"_stage_run", "distributed", "plan", "runner"},
}

# Heavy packages, and the only parts of the library that may import them.
HOMES = {
    "flax": {"models"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "PIL": {"data"},
    "pyarrow": {"data"},
    "huggingface_hub": {"weights"},
    "tokenizers": {"data", "weights"},
    "orbax": {"runs"},
    "filelock": {"runs"},
    "tabulate": {"runs"},
    "safetensors": {"weights"},
    "matplotlib": {"runs"},
    "rich": {"data", "distill", "runs"},
    "tyro": {"cli"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def arrows():
    """Returns what each part of the library imports from others."""
    found = {part: set() for part, _ in modules()}
    for part, path in modules():
        for name in imports(path):
            top, *rest = name.split(".")
            assert top != "experiments", f"{path} imports an experiment"
            if top == "jaxkd" and rest[0] != part:
                found[part].add(rest[0])
    return found


def test_arrows():
    found = arrows()
    assert set(found) == set(ARROWS), "a module has no arrows yet"
    undeclared = {part: used - ARROWS[part] for part, used in found.items()}
    assert {part: used for part, used in undeclared.items() if used} == {}


def test_arrows_within_distill():
    folder = PACKAGE / "distill"
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            prefix = "jaxkd.distill."
            names = [name for name in imports(path) if name.startswith(prefix)]
            found[path.stem] = {name.removeprefix(prefix).split(".")[0] for name in names}
    assert set(found) == set(DISTILL_ARROWS), "a module has no arrows yet"
    undeclared = {part: used - DISTILL_ARROWS[part] for part, used in found.items()}
    assert {part: used for part, used in undeclared.items() if used} == {}


@pytest.mark.parametrize("table", [ARROWS, DISTILL_ARROWS], ids=["library", "distill"])
def test_arrows_have_no_cycle(table):
    order = list(graphlib.TopologicalSorter(table).static_order())
    assert set(order) == set(table)


@pytest.mark.parametrize("heavy", HOMES)
def test_heavy_packages_are_imported_by_their_owners_only(heavy):
    users = {
        part
        for part, path in modules()
        if any(name.split(".")[0] == heavy for name in imports(path))
    }
    assert users <= HOMES[heavy]


def loaded_by(statement):
    """Names of the packages that are loaded once a statement has run in a fresh interpreter."""
    code = (
        f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_losses_need_jax_and_optax_alone():
    extra = loaded_by("import jaxkd.losses") - loaded_by("import jax, jax.numpy, optax")
    assert extra == {"jaxkd"}


@pytest.mark.parametrize(
    "module", ["data", "evaluate", "runs", "runs.report", "weights", "cli.main"]
)
def test_heavy_packages_are_loaded_only_when_needed(module):
    # JAX's own compilation cache imports filelock where it is installed.
    heavy = {*HOMES} - {"filelock"}
    assert not loaded_by(f"import jaxkd.{module}") & heavy
