"""Who may import whom, and how little `import jaxkd.losses` brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkd

PACKAGE = Path(jaxkd.__file__).parent

# Arrows point from a module to those it may import. What is not named here fails, so that a new arrow is a decision.
ARROWS = {
    "attention": set(),
    "layout": set(),
    "losses": {"attention"},
    "transfer": {"layout"},
    "models": {"attention", "layout", "transfer"},
    "data": set(),
    "checkpoints": {"transfer"},
    "parallel": set(),
    "buckets": set(),
    "evaluate": {"buckets", "losses", "models"},
    "views": set(),
    "train": {"models", "views"},
    "plan": {"models", "train", "views"},
    "cache": {"checkpoints", "runs", "views"},
    "batches": {"train"},
    "hub": {"checkpoints", "data", "models", "transfer"},
    "runs": {"checkpoints"},
    "export": {"checkpoints", "models"},
    "figures": {"checkpoints"},
    "report": {"checkpoints", "figures"},
    "verify": {"checkpoints", "evaluate", "runs"},
    "__main__": {"checkpoints", "export", "models", "transfer", "verify"},
    "course": {"batches", "buckets", "checkpoints", "evaluate", "parallel", "plan", "runs", "train"},
    "decode": set(),
    "distill": {"batches", "cache", "course", "evaluate", "models", "parallel", "plan", "runs", "train"},
}

# Heavy packages, and the only parts of the library that may touch them.
HOMES = {
    "flax": {"models"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "PIL": {"data"},
    "tokenizers": {"data", "hub"},
    "orbax": {"checkpoints"},
    "safetensors": {"checkpoints", "export"},
    "matplotlib": {"figures"},
    "rich": {"data", "distill", "report"},
    "tyro": set(),
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


def test_arrows():
    found = {part: set() for part, _ in modules()}
    for part, path in modules():
        for name in imports(path):
            top, *rest = name.split(".")
            assert top != "experiments", f"{path} imports an experiment"
            if top == "jaxkd" and rest[0] != part:
                found[part].add(rest[0])
    assert set(found) == set(ARROWS), "a module has no arrows yet"
    assert {part: used - ARROWS[part] for part, used in found.items() if used - ARROWS[part]} == {}


@pytest.mark.parametrize("heavy", HOMES)
def test_heavy_packages_stay_in_their_rooms(heavy):
    users = {part for part, path in modules() if any(name.split(".")[0] == heavy for name in imports(path))}
    assert users <= HOMES[heavy]


def loaded_by(statement):
    """Names of the packages that are loaded once a statement has run in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_losses_need_jax_and_optax_alone():
    extra = loaded_by("import jaxkd.losses") - loaded_by("import jax, jax.numpy, optax")
    assert extra == {"jaxkd"}


@pytest.mark.parametrize("module", ["data", "evaluate", "report", "runs", "checkpoints", "export"])
def test_rooms_open_without_what_they_need_only_later(module):
    heavy = {"flax", "tensorflow_datasets", "PIL", "matplotlib", "rich", "orbax", "safetensors"}
    assert not loaded_by(f"import jaxkd.{module}") & heavy
