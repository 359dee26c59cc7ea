"""Tests that the Python code of the documentation runs.

The blocks of a page run in order in one namespace, in an empty folder. HTML comments in front of a
block, in the page's source, say what the test changes:

    <!-- test replace: steps=300 -> steps=2 -->   shortens the block
    <!-- test files: photos -->                   makes the files that the reader has
    <!-- test skip: REASON -->                    does not run the block
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jaxkd import models, weights
from jaxkd.models.bert import BERT, mean_pooling

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"((?:^<!-- test .*? -->\n)*)^```python.*\n((?:.*\n)*?)```$", re.M)
DIRECTIVE = re.compile(r"^<!-- test (\w+): (.*?) -->$", re.M)


class Block(NamedTuple):
    """A block of code, its line in the page, and the comments in front of it."""

    line: int
    code: str
    directives: list[tuple[str, str]]


def read_blocks(page):
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2))
        blocks.append(Block(line, match[2], DIRECTIVE.findall(match[1])))
    assert len(blocks) == text.count("```python")
    return blocks


PAGES = {
    page.relative_to(DOCS).as_posix(): blocks
    for page in sorted(DOCS.rglob("*.md"))
    if (blocks := read_blocks(page))
}


def make_program():
    model = models.from_linen(models.CNN(features=(4,), hidden=8))
    shape = jax.ShapeDtypeStruct((28, 28, 1), jnp.uint8)
    model = models.with_input_normalization(model, [0.3], [0.3])
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape.shape), shape.dtype))
    weights.save_program("student.jaxexport", model, variables, shape)


def make_photos():
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 4)):
        for name in ("apple", "banana"):
            folder = Path("photos", part, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


def make_sentences():
    lines = ["a gripping thriller\t1", "an utter bore\t0", "a joy\t1", "dull and long\t0"]
    Path("reviews").mkdir()
    # No text of one split is in another.
    for part, prefix in (("train", ""), ("dev", "and "), ("test", "and and ")):
        content = "\n".join(prefix + line for line in lines * 8)
        Path("reviews", f"{part}.tsv").write_text(content + "\n")


def make_corpus():
    Path("corpus.txt").write_text("a gripping thriller, an utter bore, a joy\n" * 200)


def make_translations():
    Path("pairs").mkdir()
    # No pair of one split is in another.
    for language, line in (("en", "A man rides {} bikes.\n"), ("de", "Ein Mann fährt {} Rad.\n")):
        for part, first in (("train", 0), ("val", 20), ("test", 40)):
            lines = (line.format(number) for number in range(first, first + 20))
            Path("pairs", f"{part}.{language}").write_text("".join(lines), encoding="utf-8")


def make_bert():
    words = [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "an", "and", "bore", "dull", "gripping", "joy"),
        *("long", "thriller", "utter"),
    ]
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "positions": 64}
    module = BERT(len(words), num_classes=2, pooling=mean_pooling, **sizes)
    variables = models.from_linen(module).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": module.epsilon,
    }
    folder = Path("bert")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words))
    save_file(weights.to_torch(variables, module.torch_rules()), folder / "model.safetensors")


def make_teacher():
    names = ("banana", "apple")
    weights.save_safetensors("teacher.safetensors", {"params": {}}, class_names=names)


def make_resnet():
    module = models.resnet20()
    images = jnp.zeros((1, 32, 32, 3))
    variables = models.from_linen(module).init(jax.random.key(0), images)
    # The content decides the format, not the name.
    weights.save_torch("resnet20-12fca82f.th", variables, module.torch_rules())


FILES = {
    "student.jaxexport": make_program,
    "photos": make_photos,
    "reviews": make_sentences,
    "pairs": make_translations,
    "corpus.txt": make_corpus,
    "bert": make_bert,
    "teacher.safetensors": make_teacher,
    "resnet20-12fca82f.th": make_resnet,
}


@pytest.mark.thorough
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    # A reader's JAX promotes dtypes and ranks; optax's Adam needs the former.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for line, code, directives in PAGES[page]:
            skipped = False
            for kind, value in directives:
                if kind == "files":
                    FILES[value]()
                elif kind == "replace":
                    old, new = value.split(" -> ")
                    assert old in code, f"{page}:{line} has nothing to replace: {old}"
                    code = code.replace(old, new)
                else:
                    assert kind == "skip" and len(value) > 10, (
                        f"{page}:{line}: a skip needs a reason"
                    )
                    skipped = True
            if not skipped:
                # The empty lines make the line numbers of an error those of the page.
                exec(compile("\n" * line + code, str(DOCS / page), "exec"), names)
