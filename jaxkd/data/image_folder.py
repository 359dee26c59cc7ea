"""Photographs in folders named after their classes."""

import hashlib
import io
import itertools
import os
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxkd._messages import list_some, shorten, to_one_line
from jaxkd.data.class_names import (
    describe_minus_one,
    describe_respelling,
    find_missing_label,
    sort_classes,
)
from jaxkd.data.dataset import Split
from jaxkd.data.errors import DataError, import_or_raise, one_line, warn
from jaxkd.data.memory import should_stream
from jaxkd.data.progress import track
from jaxkd.data.records import Records
from jaxkd.data.text_files import FILE_NAMES, check_different

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}
# A file of more pixels must have a byte for every twenty, as photographs have: a small file may
# name any size, for which memory is then taken.
_MAX_PIXELS = 30_000_000
_MAX_PIXELS_PER_BYTE = 20
# The number of a tag in EXIF data.
_ORIENTATION = 0x0112
_MODES_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}


# Formats of which several images are an animation. A jpg may hold further views of a photograph.
_ANIMATED_FORMATS = {"GIF", "WEBP", "PNG"}


class _Listing(NamedTuple):
    """The content of a folder.

    Attributes:
        images: The images, sorted.
        sub_folders: The folders below it that hold some of them.
        passed_over: Files that are not images, and links to folders; without hidden ones.
    """

    images: list[Path]
    sub_folders: list[Path]
    passed_over: list[Path]


class Picture(NamedTuple):
    """An image as it was read.

    Attributes:
        pixels: uint8 `[H, W, C]`.
        is_transparent: Whether parts of it were transparent.
        is_animated: Whether it has further frames, which were not read.
        is_fitted: Whether it had another size.
        is_grey: Whether it had colours, of which only the brightness was read.
    """

    pixels: np.ndarray
    is_transparent: bool
    is_animated: bool
    is_fitted: bool
    is_grey: bool


def read_image_folder(
    path: Path, *, image_size: int, stream: bool | None = None
) -> tuple[Split, Split, tuple[str, ...], Split | None]:
    """Reads `train/CLASS/*`, `test/CLASS/*` and, if it is there, `val/CLASS/*`, in sorted order.

    Images are jpg, jpeg, png, bmp, gif (the first frame) and webp files, in upper or lower case, in
    a class folder or below it. Hidden files are skipped. The validation folder may also be called
    `valid`, `validation` or `dev`. Classes are sorted, integers in numeric order before other
    names.

    Args:
        path: The folder.
        image_size: Side in pixels to which every image is fitted.
        stream: Whether images are read when they are needed; see `jaxkd.data.load`.

    Returns:
        Training split, test split, class names and, if there is one, the validation split. Images
        are uint8 `[N, image_size, image_size, 3]`. Warnings say which files were passed over, which
        sub-folders were read, how many images have transparent parts or are animated, and which
        names of classes are alike or usually mean a missing label.

    Raises:
        DataError: If a folder is missing or empty, the splits differ in their classes or share a
            folder, there is only one class, or an image is damaged or not a regular file.
    """
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}: check the path")
    class_names = _class_names(path / "train")
    if len(class_names) < 2:
        raise DataError(
            f"{path / 'train'} has the class folder {shorten(class_names[0], 40)!r} alone: at "
            "least two are needed"
        )
    parts = {"train": path / "train", "test": path / "test"}
    if (validation := _find_validation(path)) is not None:
        parts["validation"] = validation
    # A part or a class may be a link.
    for name in ("", *class_names):
        check_different(part / name for part in parts.values() if (part / name).is_dir())
    for part in parts.values():
        _check_same_classes(path, class_names, part)
    _warn_of_names(path / "train", class_names)
    listings = {
        split: [_list_images(part / name) for name in class_names] for split, part in parts.items()
    }
    _warn_of_structure(path, parts.values(), itertools.chain(*listings.values()))
    count = sum(len(members.images) for split in listings.values() for members in split)
    shape = (count, image_size, image_size, 3)
    read = _stream_split if should_stream(str(path), shape, stream=stream) else _read_split
    splits = {split: read(parts[split], listings[split], image_size) for split in parts}
    return splits["train"], splits["test"], class_names, splits.get("validation")


def fit_image(image: "Image", image_size: int) -> np.ndarray:
    """Turns an image upright, converts it to RGB, and crops and scales it to a square.

    Args:
        image: Any Pillow image. Transparent parts are shown on white.
        image_size: Side of the square in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]`. The largest centred square is kept and resampled with
        antialiasing.

    Raises:
        ValueError: If the image has more than 8 bits a channel, as far as Pillow tells before it is
            decoded.
    """
    return np.asarray(_fit(_to_rgb(image)[0], image_size, image_size))


def find_images(path: Path) -> list[Path]:
    """Returns the images in a folder and below it, sorted; hidden files are skipped.

    Raises:
        DataError: If there are none.
    """
    return _list_images(path).images


def is_image(path: Path) -> bool:
    """Returns whether a file has the suffix of an image."""
    return path.suffix.lower() in _SUFFIXES


def _fit(image: "Image", width: int, height: int) -> "Image":
    return import_or_raise("PIL.ImageOps").fit(image, (width, height))


def _to_rgb(image: "Image") -> tuple["Image", bool]:
    """Returns the upright image in RGB, and whether parts of it were transparent."""
    # convert("RGB") would silently clip these modes to 255.
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its mode is {image.mode}, of more than 8 bits a channel, which would be clipped; "
            "save it with 8"
        )
    # Pillow reads colours of 16 bits as their upper 8, which are 0 where fewer bits are in use.
    if any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        raise ValueError(
            "it has more than 8 bits a channel, 16, of which the lower 8 would be dropped; "
            "save it with 8"
        )
    # Cameras store photographs as the sensor sees them and the orientation in the EXIF data.
    upright = image
    # Some formats have their EXIF data behind the pixels.
    image.load()
    # Only if needed, since Pillow copies an image that is upright as well.
    if image.getexif().get(_ORIENTATION, 1) != 1:
        upright = import_or_raise("PIL.ImageOps").exif_transpose(image)
    # A palette, and also a grey or an RGB image, may name a transparent colour.
    if upright.mode not in _MODES_WITH_ALPHA and "transparency" not in upright.info:
        return upright.convert("RGB"), False
    # "La" and "RGBa", with premultiplied colours, convert to their sibling alone.
    upright = upright.convert({"La": "LA", "RGBa": "RGBA"}.get(upright.mode, upright.mode))
    rgba = upright.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return rgba.convert("RGB"), False
    # convert("RGB") would drop alpha, and show the colour that the file has below it, often black.
    flat = import_or_raise("PIL.Image").new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=alpha)
    return flat, True


def _class_names(part: Path) -> tuple[str, ...]:
    if not part.is_dir():
        raise DataError(
            f"there is no folder {part}: images are expected in train/<class>/ and test/<class>/"
        )
    names = [entry.name for entry in part.iterdir() if entry.is_dir() and not _is_hidden(entry)]
    if not names:
        raise DataError(f"{part} has no class folders: images are expected in {part.name}/<class>/")
    for name in names:
        # Class names are printed and saved with the weights.
        if to_one_line(name) != name:
            # Control characters, and the bytes that are not UTF-8.
            is_printable = not {"Cc", "Cs"}.intersection(map(unicodedata.category, name))
            fault = (
                "has blanks at an end or unusual ones" if is_printable else "is not printable UTF-8"
            )
            raise DataError(f"{part} has the class folder {name!r}, whose name {fault}: rename it")
    return sort_classes(names)


def _find_validation(path: Path) -> Path | None:
    found = [path / name for name in FILE_NAMES["validation"] if (path / name).is_dir()]
    if len(found) > 1:
        raise DataError(
            f"{path} has several validation folders, {list_some(part.name for part in found)}: "
            "keep one"
        )
    return found[0] if found else None


def _check_same_classes(path: Path, train_names: tuple[str, ...], part: Path) -> None:
    names = _class_names(part)
    only_train, only_part = set(train_names) - set(names), set(names) - set(train_names)
    if respelled := describe_respelling(only_train, only_part):
        raise DataError(
            f"{path}: the class folders {respelled}, the first in train, the second in "
            f"{part.name}: rename one"
        )
    missing_names = {
        part.name: only_train,
        "train": only_part,
    }
    for lacking, missing in missing_names.items():
        if missing:
            raise DataError(
                f"{path / lacking} lacks the class folders {list_some(sort_classes(missing))}: "
                "add or remove them"
            )


def _warn_of_names(part: Path, class_names: tuple[str, ...]) -> None:
    # Not an error, unlike for texts: a person names a folder, a program often writes a label.
    if respelled := describe_respelling(class_names, class_names):
        warn(f"{part}: the classes {respelled}: rename one if they are the same class")
    if doubt := describe_minus_one(class_names):
        warn(f"{part}: {doubt}")
    if missing := find_missing_label(class_names):
        warn(
            f"{part}: the name of the class folder {missing!r} usually means a missing label: "
            "remove the folder unless it is a class"
        )


def _list_images(folder: Path) -> _Listing:
    images, sub_folders, passed_over = [], [], []
    # Links to folders are not followed, since they may lead back to a folder above.
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        found = [path for path in paths if path.suffix.lower() in _SUFFIXES]
        images += found
        if found and Path(parent) != folder:
            sub_folders.append(Path(parent))
        passed_over += [path for path in paths if path.suffix.lower() not in _SUFFIXES]
        passed_over += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    if not images:
        raise DataError(
            f"{folder} has no images ({', '.join(sorted(_SUFFIXES))}): "
            "add some or remove the folder"
        )
    # The order of a folder depends on the file system; results must not.
    return _Listing(sorted(images), sorted(sub_folders), sorted(passed_over))


def _raise(error: OSError) -> None:
    raise DataError(f"cannot read a folder ({one_line(error)}): check its permissions") from error


def _warn_of_structure(path: Path, parts: Collection[Path], listings: Iterable[_Listing]) -> None:
    """Says which files and folders are passed over and which sub-folders are read, if any."""
    sub_folders = []
    passed_over = sorted(
        entry
        for entry in path.iterdir()
        if entry.is_dir() and not _is_hidden(entry) and entry not in parts
    )
    for part in parts:
        passed_over += sorted(
            entry for entry in part.iterdir() if not entry.is_dir() and not _is_hidden(entry)
        )
    for listing in listings:
        sub_folders += listing.sub_folders
        passed_over += listing.passed_over
    if passed_over:
        shown = list_some(entry.relative_to(path) for entry in passed_over)
        warn(
            f"{path}: {len(passed_over):,} files and folders are passed over, since they are no "
            f"images or not in a class folder: {shown}"
        )
    if sub_folders:
        shown = list_some(folder.relative_to(path) for folder in sub_folders)
        warn(
            f"{path}: images in {len(sub_folders):,} sub-folders belong to the class of the folder "
            f"above: {shown}"
        )


def _read_split(part: Path, listings: list[_Listing], image_size: int) -> Split:
    files = [listing.images for listing in listings]
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(members) for members in files])
    paths = track(itertools.chain(*files), description=f"reading {part.name}", total=len(labels))
    images = np.empty((len(labels), image_size, image_size, 3), np.uint8)
    num_transparent = num_plain = num_animated = 0
    for i, path in enumerate(paths):
        picture = read_image(path, (image_size, image_size, 3))
        images[i] = picture.pixels
        num_transparent += picture.is_transparent
        num_animated += picture.is_animated
        # A white sign on transparent ground has vanished.
        num_plain += picture.is_transparent and images[i].min() == images[i].max()
    if num_animated:
        warn(
            f"{part}: the first frame of {num_animated:,} animated images is used; the others are "
            "not read"
        )
    if num_transparent:
        plain = f"; {num_plain:,} of them are of one colour then" if num_plain else ""
        warn(
            f"{part}: {num_transparent:,} of {len(labels):,} images have transparent parts, which "
            f"are shown on white{plain}"
        )
    return Split(images, labels)


class _ImageFiles:
    """A source of the images in files, for `Records`."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        # A million paths as text take a third of the memory.
        self._paths = [os.fspath(path) for path in paths]
        self._shape = (image_size, image_size, 3)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"inputs": read_image(Path(self._paths[index]), self._shape).pixels}


def _stream_split(part: Path, listings: list[_Listing], image_size: int) -> Split:
    """Returns a split whose images are read when they are needed."""
    files = [listing.images for listing in listings]
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(members) for members in files])
    paths = list(itertools.chain(*files))
    digest = hashlib.sha256()
    for path in paths:
        # Sizes stand for the contents.
        digest.update(f"{path.relative_to(part)} {path.stat().st_size}\n".encode(errors="replace"))
    source = _ImageFiles(paths, image_size)
    records = Records(source, fingerprint=f"{digest.hexdigest()} {image_size}")
    return Split(records["inputs"], labels)


def _check_size(image: "Image", num_bytes: int) -> None:
    """Raises `ValueError` if an image has far more pixels than its file suggests."""
    pixels = image.width * image.height
    if pixels > max(_MAX_PIXELS, _MAX_PIXELS_PER_BYTE * num_bytes):
        raise ValueError(f"it has {pixels:,} pixels in {num_bytes:,} bytes; scale it down")


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def read_image(path: Path, shape: tuple[int, int, int]) -> Picture:
    """Reads an image, crops its centre to the shape's proportions and scales it.

    Args:
        path: A file.
        shape: Height, width and channels: 3 for colours, 1 for grey.

    Raises:
        DataError: If it does not exist, is damaged, has more than 8 bits a channel, or is not a
            regular file.
    """
    # Reading from a pipe or a device may never end.
    if not path.is_file():
        if not os.path.lexists(path):
            raise DataError(f"there is no file {path}: check the path")
        raise DataError(f"{path} is not a regular file: replace or delete it")
    return _decode(path, shape, path.stat().st_size, str(path))


def decode_image(content: bytes, shape: tuple[int, int, int], origin: str) -> Picture:
    """Decodes the content of the file of an image; see `read_image`.

    Args:
        content: The content.
        shape: Height, width and channels.
        origin: Where it comes from, for messages.
    """
    return _decode(io.BytesIO(content), shape, len(content), origin)


def _decode(
    source: Path | io.BytesIO, shape: tuple[int, int, int], num_bytes: int, origin: str
) -> Picture:
    pillow = import_or_raise("PIL.Image")
    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF data and of transparent palettes; such images are usable.
            warnings.filterwarnings("ignore", module="PIL")
            with pillow.open(source) as image:
                _check_size(image, num_bytes)
                is_animated = image.format in _ANIMATED_FORMATS and image.is_animated
                rgb, is_transparent = _to_rgb(image)
                fitted = _fit(rgb, width, height)
                pixels, is_grey = _select_channels(fitted, channels)
                is_fitted = rgb.size != fitted.size
                return Picture(pixels, is_transparent, is_animated, is_fitted, is_grey)
    # SyntaxError is what Pillow raises for a broken PNG chunk.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"cannot read the image {origin} ({one_line(error)}): replace or delete it"
        ) from error


def _select_channels(image: "Image", channels: int) -> tuple[np.ndarray, bool]:
    """Returns the pixels of an RGB image, and whether colours were lost."""
    pixels = np.asarray(image)
    if channels == 3:
        return pixels, False
    # The brightness of a grey pixel is its value.
    has_colours = bool((pixels != pixels[..., :1]).any())
    return np.asarray(image.convert("L"))[..., None], has_colours
