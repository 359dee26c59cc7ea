"""MkDocs hook: adds the figures of the experiments to the site, in `figures/`."""

from pathlib import Path

from mkdocs.structure.files import File

FIGURES = Path(__file__).parent.parent / "experiments" / "results"


def on_files(files, config):
    """Adds every PNG of `experiments/results`, so that links to them are checked."""
    for path in sorted(FIGURES.glob("*.png")):
        files.append(
            File.generated(config, f"figures/{path.name}", abs_src_path=str(path))
        )
    return files
