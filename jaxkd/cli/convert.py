"""The subcommand `jaxkd convert`: PyTorch weights to a safetensors file for JAX."""

import dataclasses
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxkd._messages import list_some
from jaxkd.cli.errors import check_new, check_parent, show_warning

if TYPE_CHECKING:
    from jaxkd.transfer import Report

_MAX_CLASSES = 1_000_000
_MAX_IMAGE_LENGTH = 16_384
_MAX_PARAMETERS = 2_000_000_000

# tyro joins the lines of a paragraph and does not wrap the result, so each paragraph is one line of
# at most 78 characters. Indented lines keep their breaks.
DESCRIPTION = """Convert PyTorch weights to a safetensors file for JAX.

The arrays get the names and layouts of a model of jaxkd.models.

Load the file with jaxkd.weights.load_safetensors.

PyTorch is not needed, and no code in the weights file is run.

WEIGHTS may also be an index of shards, the folder of a hub model or a run.

Examples:
  python -m jaxkd convert resnet20.th --model resnet20 -o resnet20.safetensors
  python -m jaxkd convert resnet50.pth --model resnet50 --num-classes 37 \\
      --partial -o start.safetensors

The second example replaces the classifier by a random one of 37 classes."""


@dataclasses.dataclass(frozen=True)
class ConvertCommand:
    """Options of `jaxkd convert`."""

    weights: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="WEIGHTS")]]
    """PyTorch or safetensors file, index of shards, or folder."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Model constructor in jaxkd.models, such as resnet20."""
    output: Annotated[Path, tyro.conf.arg(metavar="OUT", aliases=["-o"])]
    """New file to write."""
    num_classes: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the model's)")
    ] = None
    """Number of classes."""
    partial: bool = False
    """Initialize randomly what the file lacks or has in another shape."""
    entry: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the only one)")
    ] = None
    """Entry of a training checkpoint that has the weights, or what their names begin with."""
    image_shape: Annotated[tuple[int, int, int], tyro.conf.arg(metavar="H W C")] = (32, 32, 3)
    """Shape of the images, on which the weights of some models depend."""

    def execute(self) -> None:
        """Converts the weights and prints what was transferred."""
        from jaxkd import models
        from jaxkd.transfer import TransferError
        from jaxkd.weights import load_safetensors

        module = _make_module(find_constructors(vars(models)), self.model, self.num_classes)
        _check_image_shape(self.image_shape)
        # Before the conversion, which may take a while.
        _check_output(self.output, self.weights)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                report = convert(
                    module,
                    self.weights,
                    self.output,
                    entry=self.entry,
                    partial=self.partial,
                    image_shape=self.image_shape,
                )
        except TransferError as error:
            # The report fills many lines, and `main` prints an error as a single one.
            print(error.report, file=sys.stderr)
            raise ValueError(
                f"{self.weights} does not fit {self.model}: {_suggest(error.report, module)}"
            ) from error
        print(report)
        if self.partial:
            print(_describe_share(report, load_safetensors(self.output)))
        print(f"wrote {self.output}")


def convert(
    module: Any,
    weights: Path,
    output: Path,
    *,
    entry: str | None = None,
    partial: bool = False,
    image_shape: Sequence[int] = (32, 32, 3),
) -> "Report":
    """Converts PyTorch weights to a safetensors file with Flax's names and layouts.

    Args:
        module: A Linen module with `torch_rules()`.
        weights: A file or a folder, as for `jaxkd.weights.load_weights`, with PyTorch's names or
            those of `save_safetensors`.
        output: The file to write, as `jaxkd.weights.save_safetensors` does.
        entry: Entry of a training checkpoint that has the weights, or what their names begin with.
        partial: Whether variables that the file lacks or has in another shape are initialized
            randomly instead of raising an error.
        image_shape: Height, width and channels of the model's images.

    Returns:
        A report of what was transferred.

    Raises:
        TransferError: If the weights do not fit the module and `partial` is False, or nothing fits.
        ValueError: If the file cannot be read.
        OSError: If a file cannot be opened or written.
    """
    import jax
    import jax.numpy as jnp

    from jaxkd import models
    from jaxkd.weights import from_torch, read_class_names, save_safetensors
    from jaxkd.weights.torch_files import read_state_dict

    state_dict = read_state_dict(weights, entry=entry)
    init = models.from_linen(module).init
    key = jax.random.key(0)
    # If every variable comes from the file, shapes and dtypes are enough.
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(init, key, images)
    if partial:
        _check_size(variables)
        variables = jax.jit(init)(key, jnp.zeros(images.shape, images.dtype))
    variables, report = from_torch(state_dict, variables, module.torch_rules(), strict=not partial)
    try:
        class_names = read_class_names(weights)
    except ValueError:  # a PyTorch file or an index
        class_names = ()
    # Those of the library's own files, unless the classes are other ones.
    if len(class_names) != module.num_classes:
        class_names = ()
    save_safetensors(output, variables, class_names=class_names)
    return report


def find_constructors(namespace: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Finds the functions that make a model whose weights can come from PyTorch.

    Args:
        namespace: The values to search by name, such as `vars(jaxkd.models)`.

    Returns:
        The public functions that have no required argument, take `num_classes` and return a module
        with `torch_rules`, by name.
    """
    return {
        name: value
        for name, value in sorted(namespace.items())
        if not name.startswith("_") and _is_constructor(value)
    }


def _is_constructor(value: Any) -> bool:
    if not inspect.isfunction(value):
        return False
    parameters = inspect.signature(value).parameters
    required = [name for name, item in parameters.items() if item.default is item.empty]
    # A Linen module has no weights before `init`, so it costs little to make one and look at it.
    return "num_classes" in parameters and not required and hasattr(value(), "torch_rules")


def _make_module(
    constructors: Mapping[str, Callable[..., Any]], name: str, num_classes: int | None
) -> Any:
    if name not in constructors:
        raise ValueError(
            f"no model {name[:40]!r} takes PyTorch weights; the models are "
            f"{', '.join(constructors)}"
        )
    if num_classes is None:
        return constructors[name]()
    if num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {num_classes}")
    if num_classes > _MAX_CLASSES:
        raise ValueError(f"--num-classes must be at most {_MAX_CLASSES:,}")
    return constructors[name](num_classes=num_classes)


def _check_image_shape(image_shape: Sequence[int]) -> None:
    if not all(1 <= length <= _MAX_IMAGE_LENGTH for length in image_shape):
        raise ValueError(
            f"--image-shape needs lengths of 1 to {_MAX_IMAGE_LENGTH:,}, "
            f"got {str(image_shape)[:80]}"
        )


def _check_output(output: Path, weights: Path) -> None:
    """Raises `ValueError` if the output exists or has no folder."""
    check_parent(output)
    # The general advice would be to remove it.
    if output.exists() and weights.exists() and output.samefile(weights):
        raise ValueError(f"{output} is the file to convert: choose another --output")
    check_new(output)


def _check_size(variables: Any) -> None:
    """Raises `ValueError` if variables are too large to draw them at random."""
    import jax

    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    if size > _MAX_PARAMETERS:
        raise ValueError(
            f"the model would have {size:,} parameters, more than {_MAX_PARAMETERS:,}: "
            "choose fewer classes or a smaller --image-shape"
        )


def _describe_share(report: "Report", variables: Mapping[str, Any]) -> str:
    """Describes how much of a model came from the file."""
    import numpy as np

    from jaxkd.transfer import leaves_by_path

    sizes = {path: np.size(leaf) for path, leaf in leaves_by_path(variables).items()}
    moved = {path for _, path in report.transferred}
    parameters = {path: size for path, size in sizes.items() if path.startswith("params/")}
    num_moved = sum(size for path, size in parameters.items() if path in moved)
    rest = "; the rest is drawn at random" if len(moved) < len(sizes) else ""
    if left := [*report.unexpected, *(mismatch.source_path for mismatch in report.mismatched)]:
        rest += f"; of the file, {len(left):,} arrays are left out, such as {list_some(left[:1])}"
    return (
        f"transferred {_describe_ratio(len(moved), len(sizes))} arrays and "
        f"{_describe_ratio(num_moved, sum(parameters.values()))} parameters{rest}"
    )


def _describe_ratio(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"


def _suggest(report: "Report", module: Any) -> str:
    """Suggests the number of classes if nothing else differs, or other options."""
    from jaxkd.weights.files import to_text
    from jaxkd.weights.torch_files import count_missing_statistics

    if not report.transferred and report.mismatched:
        path, source, target, source_path = report.mismatched[0]
        return (
            f"nothing fits, such as {to_text(source_path)}, {source.dtype}{[*source.shape]} for "
            f"{target.dtype}{[*target.shape]}: choose another --model or file"
        )
    if not report.transferred:
        names = list_some(report.unexpected) or "none that counts"
        return f"nothing fits, its names are {names}: choose another --model or file"
    num_statistics = count_missing_statistics(report)
    if num_statistics == len(report.missing) > 0 and not report.mismatched + report.unexpected:
        return (
            f"{num_statistics} running means and variances are missing: save the whole "
            "state_dict(), not parameters() alone"
        )
    if report.removed and report.unexpected and not report.missing + report.mismatched:
        return (
            f"{list_some(report.unexpected)} would be left over, besides the names that begin "
            f"with {report.removed[-1]!r}: use --entry {report.removed[-1].removesuffix('.')} "
            "to take those alone"
        )
    sizes = {
        (*mismatch.source.shape[-1:], *mismatch.target.shape[-1:]) for mismatch in report.mismatched
    }
    # The kernel and the bias of the classifier both end in the number of classes.
    for source_size, target_size in sizes if len(sizes) == 1 else ():
        if source_size != target_size == module.num_classes:
            return f"use --num-classes {source_size}, or --partial to leave out what does not fit"
    return "choose another --model, or --partial to leave out what does not fit"
