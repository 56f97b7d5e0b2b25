"""Opening the text that a config names: finds the files, decides what a document is, and mixes sources."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from trainer.config.refusals import is_utf8
from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.system.storage import Location
from trainer.text.datasets import Dataset, is_dataset
from trainer.text.files import (
    Document,
    Kind,
    Progress,
    first_fault,
    has_paragraphs,
    parts_of,
    read_documents,
)
from trainer.text.find_files import each_once, find_files
from trainer.text.source import Input, Source, is_text_file, read_records_of

# What one document of a text file is, as in data.documents.
Documents = Literal["line", "paragraph", "file", "auto"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources, used like one. Each has its own splits: train-0, validation-0, train-1 and so on."""

    sources: tuple[Source, ...]

    @property
    def train_inputs(self) -> tuple[Input, ...]:
        """Files and data sets of data.train."""
        return tuple(itertools.chain.from_iterable(source.train_inputs for source in self.sources))

    @property
    def validation_inputs(self) -> tuple[Input, ...]:
        """Files and data sets of data.validation."""
        return tuple(itertools.chain.from_iterable(source.validation_inputs for source in self.sources))

    @property
    def progress(self) -> Progress:
        """The progress of the latest reading of all sources."""
        parts = [source.progress for source in self.sources]
        return Progress(sum(part.done for part in parts), sum(part.total for part in parts))

    def names(self) -> dict[str, list[str]]:
        """Returns the files and data sets of each split, for people to read."""
        return {split: names for source in self.sources for split, names in source.names().items()}

    def fingerprint(self, say: Callable[[str], None] | None = None) -> str:
        """Returns a SHA-256 of the fingerprints of all sources, in order; see Source."""
        return hashlib.sha256("".join(source.fingerprint(say) for source in self.sources).encode()).hexdigest()

    def documents(self, say: Callable[[str], None] | None = None) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) of one source after the other."""
        for source in self.sources:
            source.progress.done, source.progress.total = 0, source.num_bytes()
        for source in self.sources:
            yield from source.documents(say)


def open_source(data: DataConfig) -> Source | Mixture:
    """Finds the files that a config names.

    Raises:
        UserError: as in find_files; or a data set of tensorflow-datasets cannot be used; or a setting has no effect on
            these files.
    """
    source: Source | Mixture
    if data.weights is not None:
        source = Mixture(tuple(_open(each, f"-{i}") for i, each in enumerate(data.sources())))
    else:
        source = _open(data)
    _check_effect(data, [*source.train_inputs, *source.validation_inputs])
    return source


def _check_effect(data: DataConfig, files: list[Input]) -> None:
    """Raises UserError if a setting has an effect on none of the files."""
    has_records = [not is_text_file(file) for file in files]
    defaults = {name: field.default for name, field in DataConfig.model_fields.items()}
    if data.text_field != defaults["text_field"] and not any(has_records):
        raise UserError(
            f"data.text_field={data.text_field!r} has no effect, as no source is JSON Lines (.jsonl, .ndjson, "
            ".jsonlines or .json, plain, .gz or .zst), a table (.parquet, .arrow) or of tensorflow-datasets; leave it "
            "out (data.text_field=none), or give such a source."
        )
    if data.documents not in (defaults["documents"], "auto") and all(has_records):
        raise UserError(
            f"data.documents={data.documents!r} has no effect on {'stories' if not files else 'records'}, each of "
            "which is a document; leave it out (data.documents=none)."
        )


def _open(data: DataConfig, suffix: str = "") -> Source:
    train = () if data.is_storybook() else find_inputs(data.train, "data.train")
    validation = () if data.validation is None else find_inputs(data.validation, "data.validation")
    return Source(_with_documents(data, (*train, *validation)), train, validation, suffix)


def _with_documents(data: DataConfig, files: Iterable[Input]) -> DataConfig:
    """Returns the settings with data.documents="auto" decided."""
    return data.model_copy(update={"documents": _documents_of(data.documents, files)})


def _documents_of(documents: Documents, files: Iterable[Input]) -> Kind:
    """Returns what a document of a text file is; the first text file decides what "auto" means."""
    if documents != "auto":
        return documents
    first = next(filter(is_text_file, files), None)
    return "paragraph" if isinstance(first, Location) and has_paragraphs(first) else "line"


def find_inputs(names: Iterable[str], setting: str) -> tuple[Input, ...]:
    """Finds the files and data sets that a setting names.

    Args:
        names: files, globs or data sets, as in data.train.
        setting: the setting that names them, for errors.

    Raises:
        UserError: as in find_files; or a data set of tensorflow-datasets cannot be used.
    """
    files: list[Input] = []
    for name in names:
        files += [Dataset.find(name, setting)] if is_dataset(name) else find_files([name], setting)
    return tuple(each_once(files))


def read_texts(
    inputs: Sequence[Input],
    setting: str,
    documents: Documents,
    text_field: str,
    field_setting: str = "data.text_field",
) -> Iterator[str]:
    """Yields the texts of files and data sets, whole and in order. Leaves out texts of white space only.

    Args:
        inputs: the files and data sets.
        setting: the setting that names them, for errors.
        documents: what is one text of a text file, as in data.documents.
        text_field: the field of a record that holds a text.
        field_setting: the setting that names this field, for errors.

    Raises:
        UserError: a file cannot be read, a record is broken, or there is no text.
    """
    kind = _documents_of(documents, inputs)
    is_empty = True
    try:
        for file in inputs:
            for text in _texts_of(file, kind, text_field):
                if isinstance(text, ValueError):
                    fault = first_fault(file) if isinstance(text, UnicodeError) and isinstance(file, Location) else None
                    raise UserError(fault or f"{file}: {text}; mend it.")
                if text and not text.isspace():
                    is_empty = False
                    yield text
    except UserError as error:
        raise UserError(str(error).replace("data.text_field", field_setting)) from None
    if is_empty:
        raise UserError(f"{setting}={[str(file) for file in inputs]}: only white space in it; give files with text.")


def _texts_of(file: Input, kind: Kind, text_field: str) -> Iterator[str | ValueError]:
    if (records := read_records_of(file, text_field)) is not None:
        yield from records
    else:
        assert isinstance(file, Location)
        for document in read_documents(file, kind):
            text = "".join(parts_of(document))
            yield text if is_utf8(text) and "\0" not in text else UnicodeError("not text in UTF-8")
