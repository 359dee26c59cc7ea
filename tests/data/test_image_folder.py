import io
import random
import sys
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
    train, test, class_names = image_folder.read_image_folder(photos, image_size=4)
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
    chex.assert_trees_all_equal(
        image_folder.read_image_folder(photos, image_size=4)[:2], expected[:2]
    )


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
    assert image_folder.read_image_folder(photos, image_size=4)[0].images[3, 0, 0].tolist() == [
        10,
        20,
        30,
    ]


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
            assert image_folder._read_image(path, 8).shape == (8, 8, 3)
            outcomes["image"] += 1
        except data.DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["error"] += 1
    assert outcomes["error"] > 10


def test_image_of_absurd_size(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(data.DataError, match=r"apple/0.png \(.*pixels.*\)"):
        data.load(photos)


def test_missing_pillow(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        data.DataError, match=r"needs PIL.Image, .*: pip install 'jaxkd-distill\[experiments\]'"
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
