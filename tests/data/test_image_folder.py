import io
import os
import random
import shutil
import sys
import unicodedata
import zlib
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from jaxkd import data
from jaxkd.data import image_folder

FRUITS = Path(__file__).parents[3] / "shared" / "data" / "fruits"


def save(path, colour=(200, 30, 30), size=(20, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two classes of plain colour: red apples, green limes."""
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            save(tmp_path / part / "lime" / f"{number}.png", (0, 100 + number, 0))
            save(tmp_path / part / "apple" / f"{number}.png", (100 + number, 0, 0))
    return tmp_path


def test_classes_and_files_are_in_sorted_order(photos):
    train, test, class_names, _ = image_folder.read_image_folder(photos, image_size=4)
    assert class_names == ("apple", "lime")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.labels.dtype == np.int32 and train.images.dtype == np.uint8
    assert train.images.shape == (6, 4, 4, 3)
    assert train.images[:, 0, 0].tolist() == [
        [100, 0, 0],
        [101, 0, 0],
        [102, 0, 0],
        [0, 100, 0],
        [0, 101, 0],
        [0, 102, 0],
    ]


def test_load_holds_out_and_resizes(photos):
    dataset = data.load(photos, image_size=5)
    assert [split.images.shape for split in dataset[:3]] == [
        (5, 5, 5, 3),
        (1, 5, 5, 3),
        (4, 5, 5, 3),
    ]
    assert data.load(str(photos)).train.images.shape == (5, 64, 64, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.bmp", "a.gif", "a.WebP"])
def test_formats(name, photos):
    save(photos / "train" / "apple" / name, (0, 0, 250))
    train = image_folder.read_image_folder(photos, image_size=4)[0]
    assert len(train.labels) == 7
    assert train.images[3, 0, 0, 2] > 240  # "a..." sorts after the digits


def test_hidden_and_other_files_are_skipped(photos):
    expected = image_folder.read_image_folder(photos, image_size=4)
    save(photos / "train" / "apple" / ".hidden.png")
    save(photos / "train" / ".thumbnails" / "a.png")
    (photos / "train" / "apple" / "notes.txt").write_text("no image")
    (photos / "train" / "README").write_text("no class")
    (photos / "extra").mkdir()
    message = "3 files and folders are passed over.*: extra, train/README, train/apple/notes.txt"
    with pytest.warns(UserWarning, match=message):
        with_others = image_folder.read_image_folder(photos, image_size=4)
    chex.assert_trees_all_equal(with_others[:2], expected[:2])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    assert image_folder.fit_image(Image.new(mode, (9, 7)), 4).shape == (4, 4, 3)


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_deep_images_are_refused_rather_than_clipped(mode, photos):
    Image.new(mode, (9, 7)).save(photos / "train" / "apple" / "deep.tiff")
    (photos / "train" / "apple" / "deep.tiff").rename(photos / "train" / "apple" / "deep.png")
    with pytest.raises(
        data.DataError, match=r"deep.png .*more than 8 bits a channel.*replace or delete it"
    ):
        data.load(photos)


def test_transparent_palette(photos):
    palette = Image.new("P", (8, 8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(photos / "train" / "apple" / "a.png", transparency=bytes([128, 255]))
    with pytest.warns(UserWarning, match="train: 1 of 7 images have transparent parts"):
        train = image_folder.read_image_folder(photos, image_size=4)[0]
    # 128 / 255 of the colour, and the rest is white.
    assert train.images[3, 0, 0].tolist() == [132, 137, 142]


def black_sign(mode):
    """A black square on transparent ground that has black below it."""
    grey_and_alpha = np.zeros((16, 16, 2), np.uint8)
    grey_and_alpha[4:12, 4:12, 1] = 255
    image = Image.fromarray(grey_and_alpha)
    if mode == "P":
        palette = Image.fromarray((grey_and_alpha[..., 1] == 255).astype(np.uint8))
        palette = palette.convert("P")
        palette.putpalette([0, 0, 0] * 256)
        palette.info["transparency"] = 0
        return palette
    if mode == "RGB":
        rgb = np.zeros((16, 16, 3), np.uint8)
        rgb[grey_and_alpha[..., 1] == 0] = (7, 0, 7)
        rgb = Image.fromarray(rgb)
        # A colour that is transparent wherever it occurs.
        rgb.info["transparency"] = (7, 0, 7)
        return rgb
    if mode == "PA":
        image = image.convert("RGBA").convert("PA")
        assert image.getextrema()[1] == (0, 255)
        return image
    # Pillow converts grey images to "La" and colour images to "RGBa" alone.
    return image.convert("RGBA").convert(mode) if mode.startswith("RGB") else image.convert(mode)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA", "P", "RGB"])
def test_black_sign_on_transparent_ground_is_black_on_white(mode):
    fitted = image_folder.fit_image(black_sign(mode), 16)
    assert (fitted[4:12, 4:12] == 0).all() and (fitted[:4] == 255).all()


def test_images_with_transparency_are_counted_and_said_once(photos, recwarn):
    for number in range(3):
        black_sign("RGBA").save(photos / "train" / "apple" / f"sign{number}.png")
    Image.new("LA", (8, 8), (255, 0)).save(photos / "train" / "apple" / "white.png")
    # An alpha channel that hides nothing is no transparency.
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(photos / "train" / "apple" / "opaque.png")
    images = data.load(photos, image_size=4).train.images
    assert (images == [1, 2, 3]).all((1, 2, 3)).sum() == 1
    (warning,) = recwarn.list
    assert str(warning.message).endswith(
        "train: 4 of 11 images have transparent parts, which are shown on white; 1 of them are of "
        "one colour then"
    )
    assert warning.filename == __file__


# Kinds of PNG, by the number in its header: RGB, grey with alpha, RGB with alpha.
@pytest.mark.parametrize(("kind", "num_channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_colour_are_refused_rather_than_cut(kind, num_channels, photos):
    def chunk(name, content):
        checksum = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + checksum

    header = (2).to_bytes(4, "big") * 2 + bytes([16, kind, 0, 0, 0])
    # Values of 12 bits, which Pillow would show as nearly black.
    rows = (b"\0" + (0x0FFF).to_bytes(2, "big") * 2 * num_channels) * 2
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (photos / "train" / "apple" / "deep.png").write_bytes(png)
    message = r"deep.png \(it has more than 8 bits a channel, 16, .*; save it with 8\): replace or"
    with pytest.raises(data.DataError, match=message):
        data.load(photos)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_images_are_counted_and_said(suffix, photos):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    for number in range(2):
        path = photos / "train" / "apple" / f"z{number}.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    message = "train: the first frame of 2 animated images is used; the others are not read"
    with pytest.warns(UserWarning, match=message) as said:
        train = image_folder.read_image_folder(photos, image_size=4)[0]
    assert len(said) == 1 and train.images[3:5].min() > 250


def test_further_views_of_a_photograph_are_no_animation(photos):
    views = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    path = photos / "train" / "apple" / "z.jpg"
    views[0].save(path, format="MPO", save_all=True, append_images=views[1:])
    assert image_folder.read_image_folder(photos, image_size=4)[0].images[3].min() > 250


def test_fit_keeps_the_centre_and_its_proportions():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert (image_folder.fit_image(Image.fromarray(image), 10) == 255).all()


def test_fit_antialiases():
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = image_folder.fit_image(Image.fromarray(checkers), 8)
    assert abs(fitted.astype(int) - 127).max() < 10


def test_fit_enlarges():
    assert (image_folder.fit_image(Image.new("RGB", (2, 2), (9, 8, 7)), 16) == [9, 8, 7]).all()


def test_exif_orientation_is_applied(photos):
    image = Image.fromarray(
        np.r_[np.zeros((8, 16, 3), np.uint8), np.full((8, 16, 3), 255, np.uint8)]
    )
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(photos / "train" / "apple" / "a.png", exif=exif)
    upright = image_folder.read_image_folder(photos, image_size=8)[0].images[3]
    assert upright[0, 0, 0] == 255 and upright[-1, 0, 0] == 0


def test_missing_folder(tmp_path):
    with pytest.raises(data.DataError, match=r"there is no folder .*/nowhere: check the path"):
        data.load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part(part, photos):
    (photos / part).rename(photos / "elsewhere")
    with pytest.raises(
        data.DataError,
        match=rf"there is no folder .*/{part}: images are expected in train/<class>/",
    ):
        data.load(photos)


def test_no_classes(photos):
    (photos / "train").rename(photos / "old")
    (photos / "train").mkdir()
    with pytest.raises(
        data.DataError, match=r"/train has no class folders: images are expected in train/<class>/"
    ):
        data.load(photos)


@pytest.mark.parametrize("part", ["train", "test"])
def test_class_without_images(part, photos):
    for image in (photos / part / "lime").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(
        data.DataError,
        match=rf"/{part}/lime has no images \(.bmp, .*\): add some or remove the folder",
    ):
        data.load(photos)


@pytest.mark.parametrize(("part", "lacking"), [("test", "train"), ("train", "test")])
def test_class_in_one_part_only(part, lacking, photos):
    save(photos / part / "pear" / "a.png")
    with pytest.raises(
        data.DataError, match=rf"/{lacking} lacks the class folders pear: add or remove them"
    ):
        data.load(photos)


def test_thousands_of_missing_classes_end_in_a_short_line(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "train" / name / "0.png")
    for number in range(1000):
        (tmp_path / "test" / f"{number}{'x' * 80}").mkdir(parents=True)
    with pytest.raises(data.DataError, match="test lacks the class folders a, b: add") as error:
        data.load(tmp_path)
    (tmp_path / "train").rename(tmp_path / "old")
    (tmp_path / "test").rename(tmp_path / "train")
    (tmp_path / "old").rename(tmp_path / "test")
    with pytest.raises(data.DataError, match=r"test lacks .* and 996 more: add") as error:
        data.load(tmp_path)
    assert len(str(error.value)) <= 300


def test_numbered_classes_are_in_numeric_order(tmp_path):
    for part in ("train", "test"):
        for number in range(12):
            save(tmp_path / part / str(number) / "0.png", (number, 0, 0))
    train, test, class_names, _ = image_folder.read_image_folder(tmp_path, image_size=1)
    assert class_names == tuple(map(str, range(12)))
    assert test.images[:, 0, 0, 0].tolist() == test.labels.tolist() == list(range(12))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_validation_folder_is_used(name, photos):
    for colour, label in (((7, 0, 0), "apple"), ((8, 0, 0), "lime")):
        save(photos / name / label / "0.png", colour)
    dataset = data.load(photos, image_size=1)
    assert [len(split.labels) for split in dataset[:3]] == [6, 2, 4]
    assert dataset.validation.images.ravel().tolist() == [7, 0, 0, 8, 0, 0]
    assert dataset.validation.labels.tolist() == [0, 1]


def test_validation_folder_has_the_same_classes_and_is_one(photos):
    save(photos / "val" / "apple" / "0.png")
    with pytest.raises(data.DataError, match="/val lacks the class folders lime: add or remove"):
        data.load(photos)
    save(photos / "val" / "lime" / "0.png")
    (photos / "validation").mkdir()
    with pytest.raises(data.DataError, match="several validation folders, validation, val: keep"):
        data.load(photos)


def test_images_below_a_class_folder_belong_to_the_class(photos):
    expected = image_folder.read_image_folder(photos, image_size=4)[0]
    (photos / "train" / "lime" / "2020" / "may").mkdir(parents=True)
    path = photos / "train" / "lime" / "2.png"
    path.rename(photos / "train" / "lime" / "2020" / "may" / "2.png")
    with pytest.warns(UserWarning, match=r"images in 1 sub-folders .*: train/lime/2020/may$"):
        train = image_folder.read_image_folder(photos, image_size=4)[0]
    chex.assert_trees_all_equal(train, expected)
    with pytest.warns(UserWarning) as said:
        data.load(photos)
    assert [warning.filename for warning in said] == [__file__]


def test_link_to_a_folder_above_is_passed_over(photos):
    (photos / "train" / "lime" / "again").symlink_to(photos / "train")
    with pytest.warns(UserWarning, match="1 files and folders are passed over.*train/lime/again"):
        assert len(image_folder.read_image_folder(photos, image_size=4)[0].labels) == 6


def test_one_class_alone_is_refused(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "apple" / "0.png")
    with pytest.raises(data.DataError, match="has the class folder 'apple' alone: at least two"):
        data.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "dangling link"])
def test_what_is_not_a_regular_file_is_refused(kind, photos):
    path = photos / "train" / "apple" / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(data.DataError, match="x.jpg is not a regular file: replace or delete it"):
        data.load(photos)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take them for one name")
def test_class_folders_of_one_name_in_two_spellings(photos):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    save(photos / "train" / nfc / "0.png")
    save(photos / "test" / nfd / "0.png")
    message = (
        r"normalisation \(NFC or NFD\) only, the first in train, the second in test: rename one"
    )
    with pytest.raises(data.DataError, match=message):
        data.load(photos)
    (photos / "test" / nfd).rename(photos / "test" / nfc)
    for part in ("train", "test"):
        save(photos / part / "Lime" / "0.png")
    message = "train: the classes 'Lime' and 'lime' differ in case only: rename one if they are the"
    with pytest.warns(UserWarning, match=message) as said:
        dataset = data.load(photos, image_size=4)
    assert dataset.class_names == ("Lime", "apple", nfc, "lime")
    assert [warning.filename for warning in said] == [__file__]


def test_class_folder_of_missing_labels_is_said(photos):
    for part in ("train", "test"):
        save(photos / part / "nan" / "0.png")
    with pytest.warns(UserWarning, match="train: the name of the class folder 'nan' usually means"):
        assert "nan" in data.load(photos, image_size=4).class_names


@pytest.mark.parametrize("name", ["pear ", " pear", "ripe  pear", "ripe\xa0pear"])
def test_class_folder_with_odd_blanks_is_refused(name, photos):
    save(photos / "train" / name / "0.png")
    with pytest.raises(data.DataError, match="whose name has blanks at an end or unusual ones: r"):
        data.load(photos)


@pytest.mark.parametrize("name", ["", "lime"])
@pytest.mark.parametrize("part", ["test", "val"])
def test_a_split_that_is_a_link_to_another_is_refused(name, part, photos):
    if part == "val":
        for label in ("apple", "lime"):
            save(photos / part / label / "0.png")
    shutil.rmtree(photos / part / name)
    (photos / part / name).symlink_to(photos / "train" / name)
    with pytest.raises(data.DataError, match=rf"/train.* and .*/{part}.* are the same: a split"):
        data.load(photos)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_class_name_that_is_not_printable_is_refused(photos):
    for name in (b"caf\xe9", b"a\nb"):
        folder = os.path.join(os.fsencode(photos), b"train", name)
        os.mkdir(folder)
        with pytest.raises(data.DataError, match="not printable UTF-8: rename it") as error:
            data.load(photos)
        str(error.value).encode("utf-8")
        assert "\n" not in str(error.value)
        os.rmdir(folder)


def test_truncated_image(photos):
    path = photos / "train" / "apple" / "a.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        data.DataError,
        match=r"cannot read the image .*/train/apple/a.jpg \(.*truncated.*\): replace",
    ):
        data.load(photos)


@pytest.mark.parametrize("content", [b"", b"text"])
def test_file_that_is_not_an_image(content, photos):
    (photos / "test" / "lime" / "a.png").write_bytes(content)
    with pytest.raises(
        data.DataError,
        match=r"cannot read the image .*/test/lime/a.png \(.*\): replace or delete it",
    ):
        data.load(photos)


def test_png_with_a_broken_chunk(photos):
    path = photos / "test" / "lime" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    start, _, rest = path.read_bytes().rpartition(b"IDAT")
    path.write_bytes(start + b"6<\xb84" + rest)  # Pillow raises SyntaxError
    with pytest.raises(data.DataError, match=r"/test/lime/0.png \(broken PNG file .*\): replace"):
        data.load(photos)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".webp"])
def test_damage_of_any_kind_is_an_image_or_a_data_error(suffix, tmp_path):
    path = tmp_path / f"image{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((24, 20), 80).convert("RGB").save(
        path, **({} if suffix in (".bmp", ".gif") else {"exif": exif})
    )
    intact = path.read_bytes()
    draw = random.Random(0)
    outcomes = {"image": 0, "error": 0}
    for trial in range(200):
        content = bytearray(intact[: draw.randrange(len(intact))] if trial % 2 else intact)
        for _ in range(2 * (len(content) > 0)):
            content[draw.randrange(min(200, len(content)))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            assert image_folder.read_image(path, (8, 8, 3)).pixels.shape == (8, 8, 3)
            outcomes["image"] += 1
        except data.DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["error"] += 1
    assert outcomes["error"] > 10


def test_image_of_absurd_size(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(data.DataError, match=r"apple/0.png \(.*pixels.*\)"):
        data.load(photos)


def test_a_small_file_of_many_pixels_is_refused(photos, monkeypatch):
    """A PNG of 20,000 x 8,000 pixels has 10 KB and takes 640 MB."""
    path = photos / "train" / "apple" / "0.png"
    Image.new("L", (6000, 5001)).save(path)
    with pytest.raises(data.DataError, match=r"0.png \(it has 30,006,000 pixels in .* bytes; sca"):
        data.load(photos)
    # As many bytes as a photograph has.
    monkeypatch.setattr(image_folder, "_MAX_PIXELS_PER_BYTE", 10_000)
    data.load(photos)


def test_missing_pillow(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        data.DataError, match=r"needs PIL.Image, .*: pip install -e '.*\[experiments\]'$"
    ):
        data.load(photos)


def test_progress_bar_on_a_terminal(photos, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    expected = image_folder.read_image_folder(photos, image_size=4)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    chex.assert_trees_all_equal(
        image_folder.read_image_folder(photos, image_size=4)[:2], expected[:2]
    )
    assert "reading train" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_nothing_is_printed_without_a_terminal(photos, capfd):
    data.load(photos)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not FRUITS.is_dir(), reason="../shared/data/fruits is absent")
def test_fruit_photographs():
    dataset = data.load(FRUITS)
    assert dataset.class_names == ("apple", "banana", "mixed", "orange")
    assert [split.images.shape for split in dataset[:3]] == [
        (216, 64, 64, 3),
        (24, 64, 64, 3),
        (60, 64, 64, 3),
    ]
    assert dataset.test.labels.tolist() == sorted(dataset.test.labels)
    chex.assert_trees_all_equal(dataset[:3], data.load(FRUITS)[:3])


def test_sets_of_which_one_alone_has_colours_are_said(photos):
    for path in (photos / "train").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    with pytest.warns(UserWarning, match="100% of the training images are grey, but 0% of the te"):
        data.load(photos, image_size=5)
