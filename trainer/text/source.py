"""The documents of the sources that a config names: read, filtered, counted and held out.

Only a part of a long document is in memory at a time. Imports TensorFlow only for a source that needs it.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

from trainer.config.settings import DataConfig
from trainer.errors import UserError
from trainer.storybook import storybook
from trainer.system.storage import Location
from trainer.text.datasets import Dataset
from trainer.text.files import LONG_CHARS, Document, Progress, digest, first_fault, read_documents, read_records
from trainer.text.formats import is_json_lines, is_table
from trainer.text.held_out import is_held_out, peek, split_file
from trainer.text.tables import read_table

# What a source is read from; the storybook has none.
Input = Location | Dataset

# The most broken records that a message names.
_NUM_NAMED = 5
_NO_BYTES = hashlib.sha256().digest()


@dataclasses.dataclass
class Tally:
    """The counts and faults of a reading, which can be added to the tallies of other processes.

    Attributes:
        num_seen: the number of documents, by the setting that names them.
        num_used: the number of documents that are long enough, by setting.
        num_bytes: the bytes of all documents, by setting; a document of over LONG_CHARS characters counts LONG_CHARS.
        num_used_bytes: the bytes of the documents that are long enough, by setting.
        longest_bytes: the bytes of the longest document, by setting.
        num_yielded: the number of documents in each split.
        num_broken: the number of records that were left out.
        broken: a line about each of the first such records.
        advice: the fault of the first file that is not UTF-8, and what to do.
    """

    num_seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_used: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_used_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    longest_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_yielded: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_broken: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)
    advice: str = ""

    def add(self, other: "Tally") -> None:
        """Adds the tally of the text that follows."""
        self.num_seen.update(other.num_seen)
        self.num_used.update(other.num_used)
        self.num_bytes.update(other.num_bytes)
        self.num_used_bytes.update(other.num_used_bytes)
        self.longest_bytes |= other.longest_bytes
        self.num_yielded.update(other.num_yielded)
        self.num_broken += other.num_broken
        self.broken = (self.broken + other.broken)[:_NUM_NAMED]
        self.advice = self.advice or other.advice


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of one source, or of several that are read one after the other, ready to be read as often as needed.

    Attributes:
        data: the settings; "auto" is decided.
        train_inputs: the files and data sets of data.train; none for the storybook.
        validation_inputs: the files and data sets of data.validation; none if part of the training text is held out.
        suffix: the end of the splits' names.
        progress: the progress of the latest reading.
    """

    data: DataConfig
    train_inputs: tuple[Input, ...]
    validation_inputs: tuple[Input, ...]
    suffix: str = ""
    progress: Progress = dataclasses.field(default_factory=Progress, compare=False)

    def names(self) -> dict[str, list[str]]:
        """Returns the files and data sets of each split, for people to read."""
        return {
            f"train{self.suffix}": [str(path) for path in self.train_inputs],
            f"validation{self.suffix}": [str(path) for path in self.validation_inputs],
        }

    def fingerprint(self, say: Callable[[str], None] | None = None) -> str:
        """Returns a SHA-256 of the contents of the files in order, whatever the names of the files. The name and split
        of a data set are hashed too, and so is the recipe of the storybook.

        Args:
            say: prints a line about files that hold the same bytes.
        """
        digests = hashlib.sha256()
        if self.data.is_storybook():
            recipe = storybook.recipe(self.data.storybook_seed, self.data.storybook_stories)
            digests.update(json.dumps(recipe).encode())
        contents: list[dict[Input, bytes]] = []
        for files in (self.train_inputs, self.validation_inputs):
            digests.update(len(files).to_bytes(8, "little"))
            contents.append({file: file.digest() if isinstance(file, Dataset) else digest(file) for file in files})
            digests.update(b"".join(contents[-1].values()))
        if say is not None:
            for line in _same_texts(*contents):
                say(line)
        return digests.hexdigest()

    def documents(self, say: Callable[[str], None] | None = None) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) in the order of the sources; the split is "train" or "validation" with the suffix.
        The parts of a document have to be read before the next document.

        Args:
            say: prints a line about broken records that were left out.

        Raises:
            UserError: a file cannot be read; more records are broken than data.max_broken_fraction; or, at the end, a
                split is left without a document.
        """
        self.progress.done = 0
        self.progress.total = self.num_bytes()
        tally = Tally()
        yield from self.read(tally)
        self.finish(tally, say)

    def read(self, tally: Tally) -> Iterator[tuple[str, Document]]:
        """Yields what `documents` yields, and counts in a tally.

        Raises:
            UserError: a file cannot be read; or a record is broken, and data.max_broken_fraction is 0.
        """
        for setting, file, number, document in self._unsplit(tally):
            if isinstance(document, str):
                try:
                    num_bytes = len(document) if document.isascii() else len(document.encode())
                except UnicodeEncodeError:
                    num_bytes = -1
                if num_bytes < 0 or "\0" in document:
                    self._leave_out(tally, file, f"document {number} is not UTF-8 or holds a NUL byte", first_fault)
                    continue
            else:
                document = _checked(document, file)
                num_bytes = LONG_CHARS
            tally.num_seen[setting] += 1
            tally.num_bytes[setting] += num_bytes
            tally.longest_bytes[setting] = max(tally.longest_bytes[setting], num_bytes)
            if num_bytes <= self.data.min_bytes:
                continue
            tally.num_used[setting] += 1
            tally.num_used_bytes[setting] += num_bytes
            # Not self.validation_inputs: it can be empty in a source that `inputs_apart` has returned.
            is_whole = self.data.validation is not None
            for split, part in [(setting, document)] if is_whole else self._split(document, file):
                tally.num_yielded[split] += 1
                yield f"{split}{self.suffix}", part

    def finish(self, tally: Tally, say: Callable[[str], None] | None) -> None:
        """Prints how many of the records were broken, and how much of the text data.min_bytes leaves out.

        Raises:
            UserError: more than data.max_broken_fraction; or a split is left without a document.
        """
        if tally.num_broken:
            share = tally.num_broken / (tally.num_broken + tally.num_seen.total())
            listed = "; ".join(tally.broken) + (" ..." if tally.num_broken > len(tally.broken) else "")
            if share > self.data.max_broken_fraction:
                raise UserError(
                    f"data.max_broken_fraction={self.data.max_broken_fraction}: {tally.num_broken} records, "
                    f"{share:.2%} of all, are broken: {listed}. Mend them, or raise it."
                    + (f" The first fault: {tally.advice}" if tally.advice else "")
                )
            if say is not None:
                say(f"{tally.num_broken} broken records ({share:.2%}) are left out: {listed}")
        self._check_not_empty(tally)
        for setting, num_seen in tally.num_seen.items():
            num_short = num_seen - tally.num_used[setting]
            if num_short and say is not None:
                share = 1 - tally.num_used_bytes[setting] / tally.num_bytes[setting]
                say(
                    f"data.{setting}: data.min_bytes={self.data.min_bytes} leaves out {num_short / num_seen:.1%} of "
                    f"{num_seen} {self._plural()}, with {share:.1%} of the text"
                )

    def documents_found(self) -> str | None:
        """Returns a line on what data.documents="auto" decided; None if no file is a text file."""
        first = next(filter(is_text_file, (*self.train_inputs, *self.validation_inputs)), None)
        if first is None:
            return None
        many = "" if self.data.documents == "paragraph" else "hardly any "
        return (
            f"data.documents='auto': a {self.data.documents} of a text file is a document, as {first} has {many}blank "
            "lines"
        )

    def inputs_apart(self) -> "list[Source]":
        """Returns a source for each input. Read one after the other, they give the documents of this source. The
        storybook's stories stay together."""
        if self.data.is_storybook():
            return [self]
        train = [dataclasses.replace(self, train_inputs=(file,), validation_inputs=()) for file in self.train_inputs]
        return train + [
            dataclasses.replace(self, train_inputs=(), validation_inputs=(file,)) for file in self.validation_inputs
        ]

    def num_bytes(self) -> int:
        """Returns the size of all files; if a file is packed, its packed size."""
        files = (file for file in (*self.train_inputs, *self.validation_inputs) if not isinstance(file, Dataset))
        return sum(file.stat().st_size for file in files)

    def _unsplit(self, tally: Tally) -> Iterator[tuple[str, Input | None, int, Document]]:
        """Yields (setting, file, number in that file from 1 on, document)."""
        if self.data.is_storybook():
            stories = storybook.stories(self.data.storybook_seed, self.data.storybook_stories)
            yield from (("train", None, number, story) for number, story in enumerate(stories, start=1))
        for setting, files in (("train", self.train_inputs), ("validation", self.validation_inputs)):
            for file in files:
                records = read_records_of(file, self.data.text_field, self.progress)
                if records is None:
                    assert not isinstance(file, Dataset)
                    assert self.data.documents != "auto"  # open_source decides.
                    documents = read_documents(file, self.data.documents, self.progress)
                    yield from ((setting, file, number, each) for number, each in enumerate(documents, start=1))
                    continue
                for number, record in enumerate(records, start=1):
                    if isinstance(record, ValueError):
                        explain = first_fault if isinstance(record, UnicodeError) else None
                        self._leave_out(tally, file, str(record), explain)
                    elif record and not record.isspace():
                        yield setting, file, number, record

    def _leave_out(
        self, tally: Tally, file: Input | None, what: str, explain: Callable[[Location], str | None] | None = None
    ) -> None:
        tally.num_broken += 1
        if explain is not None and isinstance(file, Location) and not tally.advice:
            tally.advice = explain(file) or ""
        if not self.data.max_broken_fraction:
            raise UserError(
                tally.advice or f"{file}: {what}; mend it, or set data.max_broken_fraction to leave some out."
            )
        if len(tally.broken) < _NUM_NAMED:
            tally.broken.append(f"{file}: {what}")

    def _split(self, document: Document, file: Input | None) -> Iterable[tuple[str, Document]]:
        fraction = self.data.held_out_fraction
        if self.data.documents != "file" or not isinstance(file, Location) or not is_text_file(file):
            start, document = peek(document)
            return [("validation" if is_held_out(start, fraction) else "train", document)]
        return split_file(document, file, fraction)

    def _check_not_empty(self, tally: Tally) -> None:
        for setting in ("train", "validation") if self.validation_inputs else ("train",):
            if not tally.num_used[setting]:
                raise UserError(self._why_empty(setting, tally))
        for split in ("train", "validation"):
            if not tally.num_yielded[split]:
                raise UserError(
                    f"data.held_out_fraction={self.data.held_out_fraction} of {self._counted(tally.num_used['train'])} "
                    f"leaves nothing for {'training' if split == 'train' else 'validation'}; "
                    f"{self._other_ways_to_hold_out(split, tally.num_used['train'])}."
                )

    def _why_empty(self, setting: str, tally: Tally) -> str:
        where = f"data.{setting}={list(getattr(self.data, setting))}"
        if not tally.num_seen[setting]:
            return f"{where}: only white space in it; give files with text."
        return (
            f"{where}: 0 of {tally.num_seen[setting]} {self._plural()} are longer than data.min_bytes="
            f"{self.data.min_bytes}; the longest has {tally.longest_bytes[setting]}. Lower data.min_bytes."
        )

    def _other_ways_to_hold_out(self, empty_split: str, num_documents: int) -> str:
        has_files = any(map(is_text_file, self.train_inputs))
        ways = ["give more data.storybook_stories" if self.data.is_storybook() else "give more text, data.validation"]
        # Documents are held out whole, so no fraction divides a single document, except a file, whose end is held out.
        if num_documents > 1 or self.data.is_storybook() or (has_files and self.data.documents == "file"):
            ways += [f"a {'smaller' if empty_split == 'train' else 'larger'} fraction"]
        if has_files and self.data.documents != "file":
            ways += ["data.documents='file', which holds out the end of each file"]
        return f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0].replace(",", " or")

    def _counted(self, number: int) -> str:
        return f"{number} {self._plural() if number != 1 else self._plural().removesuffix('s')}"

    def _plural(self) -> str:
        if self.data.is_storybook():
            return "stories"
        has_text_files = any(map(is_text_file, (*self.train_inputs, *self.validation_inputs)))
        return f"{self.data.documents}s" if has_text_files else "records"


def _same_texts(train: dict[Input, bytes], validation: dict[Input, bytes]) -> Iterator[str]:
    """Yields warnings about files that hold the same text, given the digest of each file of data.train and of
    data.validation.
    """
    first_in_train = _first_with(train)
    yield from _twins(train)
    for content, file in _first_with(validation).items():
        other = first_in_train.get(content, file)
        if str(other) != str(file):  # The same file in both settings gets a separate warning.
            yield f"warning: {file} of data.validation holds the same text as {other} of data.train"
    yield from _twins(validation)


def _twins(digests: dict[Input, bytes]) -> Iterator[str]:
    first = _first_with(digests)
    twins = [f"{file} as {first[each]}" for file, each in digests.items() if first.get(each, file) != file]
    if twins:
        more = f", and {len(twins) - 1} more" if len(twins) > 1 else ""
        yield f"warning: files that hold the same text are all used: {twins[0]}{more}; leave out all except one"


def _first_with(digests: dict[Input, bytes]) -> dict[bytes, Input]:
    """Returns the first file with each digest, without empty files."""
    first: dict[bytes, Input] = {}
    for file, each in digests.items():
        if each != _NO_BYTES:
            first.setdefault(each, file)
    return first


def _checked(document: Iterator[str], file: Input | None) -> Iterator[str]:
    """Yields the parts of a long document. A broken part is an error, because earlier parts are already written."""
    for part in document:
        try:
            is_right = part.isascii() or bool(part.encode())
        except UnicodeEncodeError:
            is_right = False
        if "\0" in part or not is_right:
            assert isinstance(file, Location)  # A record is not long.
            raise UserError(first_fault(file))
        yield part


def is_text_file(file: Input) -> bool:
    """Whether a file is plain text: neither JSON Lines, nor a table, nor a data set."""
    return isinstance(file, Location) and not is_json_lines(file) and not is_table(file)


def read_records_of(file: Input, field: str, progress: Progress | None = None) -> Iterator[str | ValueError] | None:
    """Returns the texts of a file whose records are documents, whatever data.documents is; None for other files.

    A record without a text gives a ValueError, which is yielded and not raised.

    Args:
        file: the file or data set.
        field: the field, feature or column that holds the text.
        progress: counts the bytes that are read.
    """
    if isinstance(file, Dataset):
        return file.records(field)
    if is_table(file):
        return read_table(file, field, progress)
    return read_records(file, field, progress) if is_json_lines(file) else None
