"""ImageNet as TFDS prepares it, from examples that TFDS draws: streamed, and distilled."""

import io
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxkd import data
from jaxkd.cli.main import main
from jaxkd.data.records import Column


def encode(image):
    """Encodes pixels, since TFDS writes files of images alone without TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Prepares mock examples with the features and splits of `imagenet2012`; returns data_dir."""
    with tfds.testing.mock_data(num_examples=60):
        mock = tfds.builder("imagenet2012")
        examples = {
            split: list(mock.as_data_source(split=split)) for split in ("train", "validation")
        }

    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = mock.version

            def _info(self):
                return self.dataset_info_from_configs(
                    features=mock.info.features, supervised_keys=mock.info.supervised_keys
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in examples}

            def _generate_examples(self, split):
                for index, example in enumerate(examples[split]):
                    # Few classes, so that some examples can be held out.
                    changes = {"image": encode(example["image"]), "label": index % 20}
                    yield index, example | changes

    folder = tmp_path_factory.mktemp("tfds")
    Imagenet2012(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.filterwarnings("ignore:.*classes are not in the validation set")
def test_streams_images_of_one_size(imagenet):
    with pytest.warns(UserWarning, match="no split test; the split validation is the test set"):
        dataset = data.load("imagenet2012", imagenet, image_size=16, stream=True)
    assert isinstance(dataset.train.images, Column)
    assert dataset.train.images[:3].shape == (3, 16, 16, 3)
    assert len(dataset.class_names) == 1000 and len(dataset.test.labels) == 60
    assert dataset.class_names[0] == "n01440764"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_distils_on_the_command_line(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet))
    run = tmp_path / "run"
    # Optax's Adam mixes floats and integers.
    with jax.numpy_dtype_promotion("standard"):
        main(
            f"distill --data imagenet2012 --image-size 16 --stream --workdir {run} --epochs 1"
            " --batch-size 16 --num-seeds 1 --teacher CNN(features=(4,),hidden=8)"
            " --student CNN(features=(2,),hidden=8)".split()
        )
    rows = json.loads((run / "results.json").read_text())
    assert {"teacher", "student_alone", "student_kd"} == {row["name"] for row in rows}
    assert np.isfinite([row["accuracy"][0] for row in rows]).all()
