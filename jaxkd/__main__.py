"""The command line: `python -m jaxkd` says what there is."""

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxkd.transfer import Report


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; an expected error ends in one line and exit status 1.

    Args:
        arguments: What stands behind `python -m jaxkd`; by default the command line's.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return
    try:
        options.run(options)
    except ImportError as error:
        sys.exit(f"error: {error}: install it, pip install 'jaxkd-distill[experiments]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def convert(
    module: Any,
    weights: Path,
    output: Path,
    *,
    entry: str | None = None,
    partial: bool = False,
    image_shape: Sequence[int] = (32, 32, 3),
) -> "Report":
    """Writes PyTorch's weights as a module's variables, with Flax's names and layouts.

    Args:
        module: A Linen module with `torch_rules()`.
        weights: PyTorch's file, or a safetensors file with PyTorch's names.
        output: The safetensors file to write, as `jaxkd.export.save_safetensors` does; unchanged on an error.
        entry: Which entry of a training's checkpoint holds the weights.
        partial: Whether variables for which the file has nothing start at random, instead of being an error.
        image_shape: Height, width and channels of the model's images.

    Returns:
        What went where.

    Raises:
        TransferError: If the weights do not fit the module and it is not to be partial.
        ValueError: If the file cannot be read.
        OSError: If a file cannot be opened or written.
    """
    import jax
    import jax.numpy as jnp

    from jaxkd import export, models
    from jaxkd.checkpoints.weights import from_torch, load_weights

    state_dict = load_weights(weights, entry=entry)
    init = models.from_linen(module).init
    given = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(init, *given)
    if partial:
        variables = jax.jit(init)(given[0], jnp.zeros(given[1].shape, given[1].dtype))
    variables, report = from_torch(state_dict, variables, module.torch_rules(), strict=not partial)
    export.save_safetensors(output, variables)
    return report


def constructors(namespace: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """The functions that make a model whose weights PyTorch has too, by name.

    Args:
        namespace: Where to look, as `vars(jaxkd.models)`.

    Returns:
        The public functions that need no argument, take `num_classes` and return a module with `torch_rules`.
    """
    return {name: value for name, value in sorted(namespace.items()) if name[0] != "_" and _is_constructor(value)}


def _is_constructor(value: Any) -> bool:
    if not inspect.isfunction(value):
        return False
    parameters = inspect.signature(value).parameters
    needed = [parameter for parameter in parameters.values() if parameter.default is parameter.empty]
    return "num_classes" in parameters and not needed and hasattr(value(), "torch_rules")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxkd", description="Knowledge distillation for JAX.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_convert(commands)
    _add_verify(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="PyTorch's weights as a file for JAX",
        description="Writes PyTorch's weights with the names and layouts of a model of jaxkd.models, as a file of\n"
        "safetensors that jaxkd.export.load_safetensors reads. PyTorch is not needed, and no code in the\n"
        "file is run.",
        epilog="examples:\n"
        "  python -m jaxkd convert resnet20.th --model resnet20 -o resnet20.safetensors\n"
        "  python -m jaxkd convert resnet50.pth --model resnet50 --num-classes 37 --partial -o start.safetensors\n"
        "\n"
        "The second keeps all but the classifier of 1000 classes; one for 37 starts at random.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="file of PyTorch, or of safetensors")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model, such as resnet20")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes, if not the model's default")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--partial", action="store_true", help="start at random where the file has nothing that fits")
    parser.add_argument("--entry", metavar="NAME", help="entry of a training's checkpoint that holds the weights")
    parser.add_argument(
        "--image-shape",
        nargs=3,
        type=int,
        default=(32, 32, 3),
        metavar=("H", "W", "C"),
        help="shape of the images, on which some models' weights depend (32 32 3)",
    )


def _convert(options: argparse.Namespace) -> None:
    from jaxkd import models
    from jaxkd.transfer import TransferError

    module = _made(constructors(vars(models)), options.model, options.num_classes)
    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"{options.output.parent} is no folder: make it, or write to another one")
    given = {"entry": options.entry, "partial": options.partial, "image_shape": options.image_shape}
    try:
        print(convert(module, options.weights, options.output, **given))
    except TransferError as error:
        print(error.report, file=sys.stderr)
        raise ValueError(f"{options.weights} does not fit {options.model}: {_advice(error.report, module)}") from error
    print(f"wrote {options.output}")


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="whether a finished run repeats, bit for bit",
        description="Runs an experiment again, by the options that a finished run recorded, and compares metrics,\n"
        "checkpoints, results and the exported student: bit for bit, times apart. Exit status 0 if all is\n"
        "identical. It takes as long as the run did.",
        epilog="examples:\n"
        "  python -m jaxkd verify runs/teacher_assistant/fashion_mnist_mini-0123abcd\n"
        "  python -m jaxkd verify RUN --keep runs/again\n"
        "\n"
        "The second leaves the new run to look at; stopped and given again, it goes on there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_verify)
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where the new run goes and stays, if not to a temporary folder"
    )


def _verify(options: argparse.Namespace) -> None:
    from jaxkd.verify import verify

    with tempfile.TemporaryDirectory(prefix="jaxkd-verify-") as temporary:
        verdicts = verify(options.folder, options.keep or temporary)
    for folder, verdict in verdicts.items():
        print(f"{folder}: " + ("differs" if verdict.differences else f"identical ({verdict.compared})"))
        for line in verdict.differences:
            print(f"  {line}")
        for line in verdict.conditions:
            print(f"  recorded: {line}")
        if verdict.differences and not verdict.conditions:
            print("  recorded alike; a GPU repeats bits only where both ran with --deterministic")
    if any(verdict.differences for verdict in verdicts.values()):
        sys.exit(1)


def _made(found: Mapping[str, Callable[..., Any]], name: str, num_classes: int | None) -> Any:
    if name not in found:
        raise ValueError(f"there is no model {name!r} that takes PyTorch's weights; there are {', '.join(found)}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {num_classes}")
    return found[name]() if num_classes is None else found[name](num_classes=num_classes)


def _advice(report: "Report", module: Any) -> str:
    """What to do, and for how many classes the weights are, if that is all that differs."""
    sizes = {(*mismatch.source.shape[-1:], *mismatch.target.shape[-1:]) for mismatch in report.mismatched}
    for theirs, ours in sizes if len(sizes) == 1 else ():
        if theirs != ours == module.num_classes:
            return f"use --num-classes {theirs}, or --partial to leave out what does not fit"
    return "choose another --model, or --partial to leave out what does not fit"


if __name__ == "__main__":
    main()
