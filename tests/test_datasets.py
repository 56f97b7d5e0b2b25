"""Laws of data sets of tensorflow-datasets as sources of text."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.text.sources import open_source


def documents(**settings):
    """The documents of each split."""
    settings = {key: (value,) if key in ("train", "validation") else value for key, value in settings.items()}
    found = {"train": [], "validation": []}
    for split, document in open_source(DataConfig(**settings)).documents():
        found[split].append(document)
    return found


class TinyStories(tfds.core.GeneratorBasedBuilder):
    """Ten stories to train on and two to test with."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._stories("train", 10), "test": self._stories("test", 2)}

    def _generate_examples(self):
        raise NotImplementedError

    def _stories(self, name, count):
        for i in range(count):
            yield i, {"text": f"{name} story {i}: 한글", "number": i}


@pytest.fixture
def tiny_stories(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "data"))
    builder = TinyStories(data_dir=tmp_path / "data")
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda name: {"tiny_stories": builder}[name])


def test_a_split_of_tensorflow_datasets_is_a_source(tiny_stories):
    found = documents(train="tfds:tiny_stories:train[:40%]", validation="tfds:tiny_stories:test")
    assert sorted(found["train"])[0].startswith("train story ") and len(set(found["train"])) == 4
    assert sorted(found["validation"]) == ["test story 0: 한글", "test story 1: 한글"]
    whole = documents(train="tfds:tiny_stories:train", validation="tfds:tiny_stories:test")["train"]
    assert found["train"] == whole[:4]  # In one order, whoever reads.

    def fingerprint(train):
        return open_source(DataConfig(train=(train,), validation=("tfds:tiny_stories:test",))).fingerprint()

    names = ["tfds:tiny_stories:train", "tfds:tiny_stories:train[:40%]", "tfds:tiny_stories:test"]
    assert len({fingerprint(name) for name in names}) == 3
    assert fingerprint(names[0]) == fingerprint(names[0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:tiny_stories", r"write tfds:NAME:SPLIT"),
        ("tfds:no_such:train", r"tensorflow-datasets cannot give it: .*no_such"),
        ("tfds:tiny_stories:nosplit", r"tensorflow-datasets cannot give it: .*nosplit"),
    ],
)
def test_a_missing_data_set_is_an_error_naming_it(tiny_stories, source, message):
    with pytest.raises(UserError, match=rf"data\.train='{source}': {message}"):
        documents(train=source)


def test_a_feature_that_is_not_text_is_an_error_naming_it(tiny_stories):
    for field in ("number", "body"):
        with pytest.raises(
            UserError, match=rf"data\.text_field='{field}' is not a text feature of tfds:.*; there are text"
        ):
            documents(train="tfds:tiny_stories:train", text_field=field)
