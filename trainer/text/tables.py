"""Texts in a column of a table: Parquet files, and Arrow files, such as those of a Hugging Face data set.

Only a few rows of a Parquet file are in memory at a time, whatever the size of the file and of its row groups. An Arrow
file is read a record batch at a time: the file format gives only the column of text, a stream gives all columns.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.errors import UserError
from trainer.system.storage import Location
from trainer.text.arrow import arrow_file
from trainer.text.files import Progress
from trainer.text.formats import START_BYTES, fault_of_pointer

# Rows are read in batches of about this many bytes of text.
_BATCH_BYTES, _MAX_BATCH_ROWS = 4 << 20, 4096
# Pages of a column are read from the disk in parts of this size, not as the whole column of a row group.
_READ_BYTES = 1 << 20
# Arrow's file format begins with this; a stream, as the library datasets writes it, does not.
_ARROW_FILE_MARK = b"ARROW1"


def read_table(path: Location, field: str, progress: Progress | None = None) -> Iterator[str | ValueError]:
    """Yields a column of a Parquet or Arrow file, in the order of the rows.

    A row without a text gives a ValueError that explains what is wrong. It is yielded and not raised, because the next
    row may be right.

    Args:
        path: the file.
        field: the name of the column; it holds strings, or bytes that are UTF-8.
        progress: counts the bytes that are read; for Parquet, the part of the file's bytes that its rows are of all.

    Raises:
        UserError: the file cannot be read, or has no such column of text.
    """
    number = 0
    for batch in _batches(path, field, progress):
        for value in batch:
            number += 1
            yield _text_of(value, field, number)


def _text_of(value: bytes | None, field: str, number: int) -> str | ValueError:
    if value is None:
        return ValueError(f"row {number} has no text in data.text_field={field!r}: it is null")
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        return ValueError(f"row {number} is not UTF-8 in data.text_field={field!r}: {error.reason} at {error.start}")
    return ValueError(f"row {number} has a NUL character in data.text_field={field!r}") if "\0" in text else text


def _batches(path: Location, field: str, progress: Progress | None) -> Iterator[list[bytes | None]]:
    """Yields the values of some rows after the other."""
    import pyarrow

    kind = "Parquet" if path.name.lower().endswith(".parquet") else "Arrow"
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
            if (fault := fault_of_pointer(path, start)) is not None:
                raise UserError(fault)
            file.seek(0)
            if kind == "Parquet":
                columns = _of_parquet(path, file, field, progress)
            else:
                columns = _of_arrow(path, file, field, progress, start.startswith(_ARROW_FILE_MARK))
            for column in columns:
                yield _as_bytes(column)
    except UserError:  # A ValueError, too.
        raise
    # Arrow raises a plain ValueError, too, for example for a name of a column that is not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        raise UserError(f"{path}: a broken or cut-off {kind} file ({reason}); fetch it again.") from None


def _of_parquet(path: Location, file: BinaryIO, field: str, progress: Progress | None) -> Iterator[Any]:
    from pyarrow import parquet

    opened = parquet.ParquetFile(
        arrow_file(file), pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
    )
    _check_column(path, opened.schema_arrow, field)
    num_rows, num_bytes = opened.metadata.num_rows, path.stat().st_size
    rows = done = 0
    for batch in opened.iter_batches(_rows_at_a_time(opened.metadata, field), columns=[field], use_threads=False):
        yield batch.column(0)
        if progress is not None:
            rows += batch.num_rows
            progress.done, done = progress.done + num_bytes * rows // num_rows - done, num_bytes * rows // num_rows


def _rows_at_a_time(metadata: Any, field: str) -> int:
    """Returns the number of rows that hold about _BATCH_BYTES of text."""
    num_bytes = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = (group.column(j) for j in range(group.num_columns))
        num_bytes += sum(each.total_uncompressed_size for each in columns if each.path_in_schema == field)
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(num_bytes, 1)))


def _of_arrow(
    path: Location, file: BinaryIO, field: str, progress: Progress | None, is_file_format: bool
) -> Iterator[Any]:
    from pyarrow import ipc

    open_it = ipc.open_file if is_file_format else ipc.open_stream
    schema = open_it(arrow_file(file)).schema
    _check_column(path, schema, field)
    file.seek(0)
    # Only this column is read, or of a stream, which is read whole, decompressed.
    options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)])
    opened = open_it(arrow_file(file), options=options)
    batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file_format else iter(opened)
    before = 0
    for batch in batches:
        column = batch.column(0)
        column.validate(full=True)  # Reading an unchecked offset of a damaged file would end the process.
        for start in range(0, len(column), _MAX_BATCH_ROWS):
            yield column[start : start + _MAX_BATCH_ROWS]
        if progress is not None:
            progress.done, before = progress.done + file.tell() - before, file.tell()


def _check_column(path: Location, schema: Any, field: str) -> None:
    """Raises UserError if a table does not have exactly one such column of text."""
    columns = ", ".join(f"{each.name} ({each.type})"[:80] for each in list(schema)[:20])
    others = [each.name for each in schema if _is_text(each.type)]
    advice = f"name a column of text, such as data.text_field={others[0]!r}" if others else "none of them is a text"
    found = schema.get_all_field_indices(field)
    if not found:
        raise UserError(f"{path}: no column data.text_field={field!r}; there are {columns}: {advice}.")
    if len(found) > 1:
        raise UserError(f"{path}: {len(found)} columns have the name data.text_field={field!r}; rename all except one.")
    if not _is_text(schema.field(field).type):
        what = schema.field(field).type
        raise UserError(f"{path}: data.text_field={field!r} is a column of {what}; there are {columns}: {advice}.")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in (*tests, types.is_binary_view))


def _as_bytes(column: Any) -> list[bytes | None]:
    """Returns the values of a column of text. As bytes, because Arrow does not check that strings are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values
