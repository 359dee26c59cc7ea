"""The subcommand `jaxkd convert`: PyTorch weights to a safetensors file for JAX."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from jaxkd.transfer import Report

# tyro joins the lines of a paragraph and does not wrap the result, so each paragraph is one line of
# at most 78 characters. Indented lines keep their breaks.
DESCRIPTION = """Convert PyTorch weights to a safetensors file for JAX.

The arrays get the names and layouts of a model of jaxkd.models.

Load the file with jaxkd.weights.load_safetensors.

PyTorch is not needed, and no code in the weights file is run.

Examples:
  python -m jaxkd convert resnet20.th --model resnet20 -o resnet20.safetensors
  python -m jaxkd convert resnet50.pth --model resnet50 --num-classes 37 \\
      --partial -o start.safetensors

The second example replaces the classifier by a random one of 37 classes."""


@dataclasses.dataclass(frozen=True)
class ConvertCommand:
    """Options of `jaxkd convert`."""

    weights: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="WEIGHTS")]]
    """PyTorch file or safetensors file with PyTorch's names."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Model constructor in jaxkd.models, such as resnet20."""
    output: Annotated[Path, tyro.conf.arg(metavar="OUT", aliases=["-o"])]
    """File to write."""
    num_classes: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the model's)")
    ] = None
    """Number of classes."""
    partial: bool = False
    """Initialize randomly what the file lacks or has in another shape."""
    entry: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the only one)")
    ] = None
    """Entry of a training checkpoint that has the weights."""
    image_shape: Annotated[tuple[int, int, int], tyro.conf.arg(metavar="H W C")] = (32, 32, 3)
    """Shape of the images, on which the weights of some models depend."""

    def execute(self) -> None:
        """Converts the weights and prints what was transferred."""
        from jaxkd import models
        from jaxkd.transfer import TransferError

        module = _make_module(find_constructors(vars(models)), self.model, self.num_classes)
        # Before the conversion, which may take a while.
        if not self.output.absolute().parent.is_dir():
            raise ValueError(
                f"the folder {self.output.parent} does not exist: create it or choose another one"
            )
        try:
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
        weights: A PyTorch file, or a safetensors file with PyTorch's names.
        output: The file to write, as `jaxkd.weights.save_safetensors` does. An error leaves it
            unchanged.
        entry: Entry of a training checkpoint that has the weights.
        partial: Whether variables that the file lacks or has in another shape are initialized
            randomly instead of raising an error.
        image_shape: Height, width and channels of the model's images.

    Returns:
        A report of what was transferred.

    Raises:
        TransferError: If the weights do not fit the module and `partial` is False.
        ValueError: If the file cannot be read.
        OSError: If a file cannot be opened or written.
    """
    import jax
    import jax.numpy as jnp

    from jaxkd import models
    from jaxkd.weights import from_torch, load_weights, save_safetensors

    state_dict = load_weights(weights, entry=entry)
    init = models.from_linen(module).init
    key = jax.random.key(0)
    if partial:
        variables = jax.jit(init)(key, jnp.zeros((1, *image_shape), jnp.float32))
    else:
        # Every variable comes from the file, so shapes and dtypes are enough.
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        variables = jax.eval_shape(init, key, images)
    variables, report = from_torch(state_dict, variables, module.torch_rules(), strict=not partial)
    save_safetensors(output, variables)
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
            f"no model {name!r} takes PyTorch weights; the models are {', '.join(constructors)}"
        )
    if num_classes is None:
        return constructors[name]()
    if num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {num_classes}")
    return constructors[name](num_classes=num_classes)


def _suggest(report: "Report", module: Any) -> str:
    """Suggests the number of classes if nothing else differs, or other options."""
    sizes = {
        (*mismatch.source.shape[-1:], *mismatch.target.shape[-1:]) for mismatch in report.mismatched
    }
    # The kernel and the bias of the classifier both end in the number of classes.
    for source_size, target_size in sizes if len(sizes) == 1 else ():
        if source_size != target_size == module.num_classes:
            return f"use --num-classes {source_size}, or --partial to leave out what does not fit"
    return "choose another --model, or --partial to leave out what does not fit"
