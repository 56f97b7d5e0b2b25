"""Text of tensorflow-datasets, by name and split."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from trainer.errors import UserError

PREFIX = "tfds:"


def is_dataset(source: str) -> bool:
    """Whether a source is a data set: tfds:NAME:SPLIT, such as tfds:imdb_reviews:train[:90%]."""
    return source.startswith(PREFIX)


class Dataset(NamedTuple):
    """A split, or a slice of a split, of a data set of tensorflow-datasets.

    Attributes:
        name: the name of the data set.
        split: the split, such as train[:90%].
    """

    name: str
    split: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}:{self.split}"

    @classmethod
    def find(cls, source: str, setting: str) -> Self:
        """Reads tfds:NAME:SPLIT, and downloads the data if this machine does not have it.

        Raises:
            UserError: the data set or split does not exist, or cannot be downloaded.
        """
        name, _, split = source.removeprefix(PREFIX).partition(":")
        if not name or not split:
            raise UserError(f"{setting}={source!r}: write tfds:NAME:SPLIT, such as tfds:imdb_reviews:train[:90%].")
        found = cls(name, split)
        try:
            builder = found._builder()
            builder.download_and_prepare()
            _ = builder.info.splits[split].num_examples
        except Exception as error:  # Each data set is a program and raises its own kinds.
            reason = str(error).strip().split("\n")[0][:300]
            raise UserError(f"{setting}={source!r}: tensorflow-datasets cannot give it: {reason}.") from None
        return found

    def digest(self) -> bytes:
        """Returns a SHA-256 of the data set's files, its name and the split."""
        info = self._builder().info
        digest = hashlib.sha256(f"{info.full_name}:{self.split}".encode())
        for path in sorted(info.splits[self.split.partition("[")[0].strip()].filepaths, key=str):
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()

    def records(self, field: str) -> Iterator[str | ValueError]:
        """Yields a text feature of each example, in the order of the files. An example that is not UTF-8 gives an
        error, which is yielded and not raised.

        Raises:
            UserError: the data set does not have such a text feature.
        """
        import tensorflow_datasets as tfds

        builder = self._builder()
        features = builder.info.features.items()
        texts = sorted(name for name, feature in features if isinstance(feature, tfds.features.Text))
        if field not in texts:
            raise UserError(f"data.text_field={field!r} is not a text feature of {self}; there are {', '.join(texts)}.")
        examples = builder.as_dataset(
            split=self.split, shuffle_files=False, decoders=tfds.decode.PartialDecoding({field: True})
        )
        for number, example in enumerate(examples.as_numpy_iterator()):
            try:
                yield example[field].decode()
            except UnicodeDecodeError as error:
                yield ValueError(f"example {number} is not UTF-8: {error.reason} at byte {error.start}")

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder(self.name)
