"""Verifies every byte of prepared data, and shows its counts, the lengths of its documents and some documents.

It maps the files of tokens and offsets into memory and reads only what it needs, so the data may be larger than memory.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.bar
import rich.box
import rich.console
import rich.table
import rich.text

from trainer.data.coverage import lengths_of
from trainer.data.shards import MANIFEST, PreparedData, Split, faults_of_files, prepared_in
from trainer.errors import UserError
from trainer.runs.parentage import describe_history
from trainer.runs.run_data import find_data_folder
from trainer.runs.run_folder import RECORD, RunFolder, run_and_step
from trainer.system.storage import Location, Url, locate, on_disk
from trainer.system.terminal import warn

_BAR_WIDTH = 30
# A character takes at most this many tokens: its bytes in UTF-8, if the vocabulary has no token for it.
_TOKENS_PER_CHARACTER = 4
_NAMES_SHOWN = 5


def inspect(path: str, split_name: str = "train", num_examples: int = 3, sequence_length: int | None = None) -> bool:
    """Prints what is in prepared data, and whether all its files are as they were written.

    Args:
        path: a prepared folder; or a run's folder, for what the run comes from and the data it was started on. If it is
            in an object store, a copy is read.
        split_name: the split whose lengths and documents are shown: "train" or "validation".
        num_examples: the number of documents to show.
        sequence_length: a length; how much lines mode would cut at it is shown, too.

    Returns:
        Whether all files are as they were written. Otherwise the names of all damaged files are printed to stderr, and
        none of them is read.

    Raises:
        UserError: path is neither of the two, or a number is impossible.
    """
    if num_examples < 0:
        raise UserError(f"--examples {num_examples} must be at least 0.")
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"--sequence-length {sequence_length} must be at least 1.")
    run = _run_of(path)
    console = rich.console.Console(highlight=False)
    for line in [] if run is None else [*describe_history(run), *_average_of(run)]:  # Before the data, maybe gone.
        console.print(_visible(line))
    stored = _data_of(path, run)
    with on_disk(stored) as folder:
        try:
            prepared = prepared_in(folder)
        except UserError as error:
            return _warn_of(str(error).replace(str(folder), str(stored)))
        if run is not None and prepared.fingerprint != run.facts["data_fingerprint"]:
            return _warn_of(f"{stored} is not the data that {run.path} was started on.")
        console.print(_facts(prepared, stored), _counts(prepared))
        with console.status("reading all files"):
            faults = list(faults_of_files(prepared))
        if faults:
            return _warn_of("\n  ".join([f"{stored} is damaged; delete it and prepare again:", *faults]))
        num_files = 1 + len(prepared.tokenizer_files) + 2 * sum(len(each.shards) for each in prepared.splits.values())
        console.print(f"Verified: all {num_files} files are unchanged, to the last bit.\n")
        _print_lengths(console, prepared.split(split_name), folder, split_name, sequence_length)
        if num_examples:
            console.print()
            console.print(_examples(prepared, prepared.split(split_name), split_name, num_examples, console.width))
    return True


def document(prepared: PreparedData, split: Split, number: int, max_tokens: int) -> tuple[int, np.ndarray]:
    """Returns the length of a document in tokens, and its first max_tokens tokens."""
    firsts = np.cumsum([0, *(shard.num_documents for shard in split.shards)])
    place = int(np.searchsorted(firsts, number, side="right")) - 1
    shard, index = split.shards[place], number - firsts[place]
    start, end = np.memmap(prepared.folder / shard.offsets_file, "<i8", "r")[index : index + 2].tolist()
    tokens = np.memmap(prepared.folder / shard.tokens_file, np.dtype(prepared.dtype).newbyteorder("<"), "r")
    return end - start - 1, np.array(tokens[start + 1 : min(end, start + 1 + max_tokens)])


def _run_of(path: str) -> RunFolder | None:
    """Returns the run that path names, by its folder or by one of its checkpoints; None if it names none."""
    run_folder, _ = run_and_step(path)
    return RunFolder(run_folder) if (locate(run_folder) / RECORD).is_file() else None


def _average_of(run: RunFolder) -> Iterator[str]:
    """Yields a line about the average of a run's weights, if it has one."""
    decay = run.config.optimizer.ema_decay
    if decay is not None:
        yield f"its model is the average of the weights that each checkpoint has: optimizer.ema_decay={decay}"


def _data_of(path: str, run: RunFolder | None) -> Location:
    """Returns the folder of prepared data that path names: its own, or that of the run."""
    if run is not None:
        return find_data_folder(run)
    location = locate(path)
    if not (location / MANIFEST).is_file() and not _has_shards(location):
        raise UserError(
            f"{location} is neither prepared data, which has a {MANIFEST}, nor a run folder, which has a {RECORD}."
            f"{_data_near(location)}"
        )
    return location


def _has_shards(folder: Location) -> bool:
    return folder.is_dir() and any(entry.name.endswith((".tokens", ".offsets")) for entry in folder.iterdir())


def _data_near(path: Location) -> str:
    if isinstance(path, Url):
        return ""
    found = sorted(
        str(file.parent) for file in itertools.chain(path.glob(f"*/{MANIFEST}"), path.parent.glob(f"*/{MANIFEST}"))
    )
    return f" Prepared data near it: {', '.join(found[:_NAMES_SHOWN])}." if found else ""


def _warn_of(fault: str) -> bool:
    warn(f"trainer: {fault}")
    return False


def _facts(prepared: PreparedData, stored: Location) -> rich.table.Table:
    table = rich.table.Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("data", _visible(str(stored)))
    table.add_row("fingerprint", prepared.fingerprint)
    table.add_row(
        "tokenizer", f"{prepared.tokenizer_kind}, {prepared.vocabulary_size:,} tokens, stored as {prepared.dtype}"
    )
    table.add_row("", prepared.tokenizer_fingerprint)
    table.add_row("source", prepared.source_fingerprint)
    for name, files in prepared.sources.items():
        more = f" and {len(files) - _NAMES_SHOWN:,} more" if len(files) > _NAMES_SHOWN else ""
        without_files = "the storybook" if name == "train" else "held out of train"
        table.add_row("", _visible(f"{name}: {', '.join(files[:_NAMES_SHOWN]) or without_files}{more}"))
    return table


def _counts(prepared: PreparedData) -> rich.console.Group:
    names, splits = list(prepared.splits), list(prepared.splits.values())
    counts = rich.table.Table("", box=rich.box.SIMPLE_HEAD)
    for name in names:
        counts.add_column(name, justify="right")
    rows = {
        "documents": [f"{split.num_documents:,}" for split in splits],
        "tokens": [f"{split.num_tokens:,}" for split in splits],
        "bytes": [f"{split.num_bytes:,}" for split in splits],
        "bytes per token": [f"{split.num_bytes / max(split.num_tokens, 1):.2f}" for split in splits],
        "[UNK]": [f"{split.num_unknown / max(split.num_tokens, 1):.2%}" for split in splits],
        "shards": [f"{len(split.shards):,}" for split in splits],
    }
    for name, values in rows.items():
        counts.add_row(rich.text.Text(name), *values)
    shards = rich.table.Table("shard", box=rich.box.SIMPLE_HEAD)
    for name in ("documents", "tokens", "bytes on disk"):
        shards.add_column(name, justify="right")
    width = np.dtype(prepared.dtype).itemsize
    for shard in itertools.chain.from_iterable(split.shards for split in splits):
        num_bytes = shard.stream_length() * width + (shard.num_documents + 1) * 8
        shards.add_row(
            shard.tokens_file.removesuffix(".tokens"),
            f"{shard.num_documents:,}",
            f"{shard.num_tokens:,}",
            f"{num_bytes:,}",
        )
    return rich.console.Group(counts, shards)


def _print_lengths(
    console: rich.console.Console, split: Split, folder: Path, name: str, sequence_length: int | None
) -> None:
    lengths = lengths_of(split, folder)
    most = max(number for _, _, number in lengths.bins())
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title=f"lengths of the documents of {name}", title_justify="left"
    )
    for column in ("tokens", "documents", "share"):
        table.add_column(column, justify="right")
    table.add_column()
    for shortest, longest, number in lengths.bins():
        span = f"{shortest:,}" if shortest >= longest else f"{shortest:,} to {longest:,}"
        share = f"{number / split.num_documents:.1%}"
        table.add_row(span, f"{number:,}", share, rich.bar.Bar(most, 0, number, width=_BAR_WIDTH))
    console.print(table)
    console.print(
        f"median {lengths.percentile(50):,}, p90 {lengths.percentile(90):,}, max {lengths.values[-1]:,} tokens"
    )
    if sequence_length is not None:
        num_documents, num_tokens = lengths.cut_at(sequence_length)
        console.print(
            f"at sequence length {sequence_length:,}, lines mode cuts {num_documents / split.num_documents:.2%} of the "
            f"documents and leaves out {num_tokens / max(split.num_tokens, 1):.2%} of the tokens"
        )


def _examples(prepared: PreparedData, split: Split, name: str, num_examples: int, width: int) -> rich.table.Table:
    tokenizer = prepared.tokenizer()
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title=f"some documents of {name}", title_justify="left", expand=True
    )
    table.add_column("number", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("text", ratio=1, no_wrap=True, overflow="ellipsis")
    num_examples = min(num_examples, split.num_documents)
    for i in range(num_examples):
        number = (2 * i + 1) * split.num_documents // (2 * num_examples)
        length, tokens = document(prepared, split, number, _TOKENS_PER_CHARACTER * width)
        text = tokenizer.decode(tokens) + ("…" if len(tokens) < length else "")
        table.add_row(f"{number:,}", f"{length:,}", _visible(text))
    return table


def _visible(text: str) -> rich.text.Text:
    """Escapes characters that would end the line or control the terminal, and keeps rich from reading markup."""
    return rich.text.Text(repr(text)[1:-1])
