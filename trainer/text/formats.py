"""Recognizes files that are not text in UTF-8 by their names and bytes, and gives the command that converts them.

Opens no file. The commands are for the shell of Linux and macOS, and keep a file's name if possible, so that the same
setting or glob finds the text afterwards.
"""

import codecs
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.system.storage import Location, Url

# A program that files of text may be packed with.
Packer = Literal["gzip", "zstd"]
# Their first bytes. pzstd begins with a frame to skip, which has one of 16 marks.
_PACKER_MARKS: dict[Packer, bytes] = {"gzip": rb"\x1f\x8b", "zstd": rb"\(\xb5/\xfd|[P-_]\*M\x18"}
_PACKER_SUFFIXES: dict[Packer, str] = {"gzip": ".gz", "zstd": ".zst"}
_PYTHON = shlex.quote(sys.executable or "python3")
# This many bytes at a file's start determine its format.
START_BYTES = 512
# This many bytes of a text determine its encoding.
SAMPLE_BYTES = 1 << 17

_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_TO_JSON_LINES = {
    ".csv": "import csv, io, json, sys; csv.field_size_limit(sys.maxsize); [print(json.dumps(row)) for row in "
    'csv.DictReader(io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", newline=""))]',
    ".tsv": "import csv, io, json, sys; csv.field_size_limit(sys.maxsize); [print(json.dumps(row)) for row in "
    'csv.DictReader(io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", newline=""), delimiter="\\t")]',
    ".json": 'import json, sys; [print(json.dumps(row if isinstance(row, dict) else {"text": row})) for row in '
    'json.loads(sys.stdin.buffer.read().decode("utf-8-sig"))]',
    # Objects over several lines: each ends with a line that holds only its closing brace.
    ".json of objects": 'import json, re, sys; [print(json.dumps(json.loads(part + "}"))) for part in '
    're.split(r"(?m)^\\}\\s*$", sys.stdin.buffer.read().decode("utf-8-sig")) if part.strip()]',
}
_UNPACKERS = {rb"\xfd7zXZ\0": "xz", rb"\(\xb5/\xfd": "zstd", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2"}
_UNPACKED_SUFFIXES = {"xz": ".xz", "zstd": ".zst", "bzip2": ".bz2"}
_MARKS = {  # The longer ones first.
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip

_HIRAGANA = "".join(map(chr, range(0x3041, 0x3094)))
_COMMON = {
    "Korean": "이다는의에가을로고를한지은도하사서기자대나어리인시정그있아부스보해장주전들여게것",
    "Japanese": _HIRAGANA,
    "Chinese": "的一是不了在人有我他这個个们們中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那于於自之",
    "Cyrillic": "оеаинтсрвл",
    "Greek": "αοιετσνηυρ",
}
# (Python's name, iconv's name, the language): encodings with several bytes per character, and with one.
_MULTIBYTE = (
    ("cp949", "CP949", "Korean"),
    ("cp932", "CP932", "Japanese"),
    ("euc_jp", "EUC-JP", "Japanese"),
    ("gb18030", "GB18030", "Chinese"),
    ("big5", "BIG5", "Chinese"),
    *((f"utf-16-{order.lower()}", f"UTF-16{order}", of) for order in ("LE", "BE") for of in _COMMON),
)
_SINGLE_BYTE = (("cp1251", "CP1251", "Cyrillic"), ("koi8_r", "KOI8-R", "Cyrillic"), ("cp1253", "CP1253", "Greek"))
# A third to all of the non-ASCII characters in text of a language are among its commonest characters; in other bytes,
# decoded as such text, one in 30 is.
_LEAST_SHARE, _MOST_BROKEN = 0.2, 0.02


class Encoding(NamedTuple):
    """An encoding that a text is likely to be in.

    Attributes:
        name: the name that iconv uses.
        language: the language of the text, or how the encoding was recognized.
    """

    name: str
    language: str


def packer_of_name(path: Location) -> Packer | None:
    """Returns the program that a file is packed with, by its name; None if it is not packed."""
    names = _PACKER_SUFFIXES.items()
    return next((packer for packer, suffix in names if path.name.lower().endswith(suffix)), None)


def packer_of_start(start: bytes) -> Packer | None:
    """Returns the program that a file is packed with, by its first bytes; None if it is not packed."""
    return next((packer for packer, mark in _PACKER_MARKS.items() if re.match(mark, start)), None)


def is_json_lines(path: Location) -> bool:
    """Whether a file holds a JSON object per line, by its name, even if the file is packed."""
    name = path.name.lower()
    for end in _UNPACKED_SUFFIXES.values():
        name = name.removesuffix(end)
    return name.removesuffix(".gz").endswith(_JSON_LINES_SUFFIXES)


def is_table(path: Location) -> bool:
    """Whether a file holds a table of columns, Parquet or Arrow, by its name."""
    return path.name.lower().endswith(_TABLE_SUFFIXES)


def fault_of_name(path: Location) -> str | None:
    """Returns what to do with a file that has the name of a table, or None."""
    suffix = _suffix(path)
    return (
        _as_json_lines(path, suffix, f"a {suffix} file", packer_of_name(path)) if suffix in (".csv", ".tsv") else None
    )


def fault_of_start(path: Location, start: bytes, packer: Packer | None) -> str | None:
    """Returns what a file is and what to do, if its first bytes show that it is not text in UTF-8; or None.

    Args:
        path: the file.
        start: the first START_BYTES bytes of the file, unpacked if it is packed.
        packer: the program that the file is packed with.
    """
    if (fault := fault_of_pointer(path, start)) is not None:
        return fault
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return f"{path}: {name}, by its byte-order mark; {_convert(path, name, packer)}"
    what = "a zip archive"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if b"[Content_Types].xml" in start or b"mimetypeapplication/" in start:
            return f"{path}: a document of an office program or an e-book; save it there as text in UTF-8."
        command = f"{_PYTHON} -m zipfile -e {_quoted(path)} {_quoted(path, '.unpacked')}"
    elif start[257:262] == b"ustar" and b"\0" in start:
        what, folder = "a tar archive", _quoted(path, ".unpacked")
        command = f"mkdir {folder} && tar -xf {_quoted(path)} -C {folder}"
    elif re.match(rb"7z\xbc\xaf'\x1c|Rar!\x1a\x07|%PDF-\d\.\d\s*[\r\n]|\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", start):
        return f"{path}: an archive or a document of another program, by its first bytes; take the text out of it."
    elif re.match(rb"PAR1[\0-\x08\x0e-\x1f]", start):  # A text may begin with this word, too.
        return _as_parquet(path, packer)
    else:
        for mark, tool in _UNPACKERS.items():
            if re.match(mark, start):
                return f"{path}: packed with {tool}, by its first bytes; {_unpack(path, tool)}"
        return None
    return f"{path}: {what}, by its first bytes; unpack it with\n  {command}\nand name the files in {path}.unpacked."


def fault_of_pointer(path: Location, start: bytes) -> str | None:
    """Returns what to do with a file that Git LFS has put in the place of a large one; None for other files."""
    if not start.startswith(b"version https://git-lfs.github.com/spec/"):
        return None
    return f"{path}: a pointer of Git LFS, not the file itself; run git lfs pull in the folder that was cloned."


def fault_of_packed_name(path: Location, packer: Packer, start: bytes) -> str:
    """Returns what to do with a file that is named as packed by a program, but does not begin like such a file."""
    try:
        is_text = b"\0" not in start and bool(codecs.getincrementaldecoder("utf-8")().decode(start))
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        return f"{path}: a broken or cut-off {packer} file (it does not begin as one); fetch it again."
    suffix = _PACKER_SUFFIXES[packer]
    plain = _word(_shown(path)[: -len(suffix)])
    return (
        f"{path}: named {suffix}, and not packed with {packer}; give it its right name:\n  mv {_quoted(path)} {plain}"
    )


def fault_of_zstd(path: Location, reason: str) -> str:
    """Returns what to do with a file packed with zstd that cannot be unpacked, given the error of the unpacker."""
    if "too much memory" in reason:  # More than 128 MB, which other programs refuse, too.
        return f"{path}: packed with zstd --long; {_unpack(path, 'zstd', '--long=31 ')}"
    return f"{path}: a broken or cut-off zstd file ({reason}); fetch it again."


def fault_of_first_line(path: Location, line: str, packer: Packer | None) -> str | None:
    """Returns what to do with a file that is named as JSON Lines, if its first line is of other JSON; or None."""
    kind, what = ".json", "a JSON array"
    if line.strip() == "{":
        kind, what = ".json of objects", "a JSON object over several lines"
    elif not line.lstrip().startswith("["):
        return None
    return _as_json_lines(path, kind, f"{what}, where JSON Lines has an object on each line", packer)


def fault_of_bytes(path: Location, sample: bytes, is_cut_off: bool, packer: Packer | None) -> str:
    """Returns what to do with a file that is not UTF-8, by the bytes around the first fault.

    Args:
        path: the file.
        sample: the bytes before and after the fault, beginning with a line if possible.
        is_cut_off: whether the file ends within a character.
        packer: the program that it is packed with.
    """
    if (encoding := encoding_of(sample)) is not None:
        return f"it looks like {encoding.name} ({encoding.language}); {_convert(path, encoding.name, packer)}"
    if b"\0" in sample:
        command = _piped(path, r"tr -d '\000'", packer)
        return f"is it text? If so, this leaves the NUL bytes out:\n  {command}"
    if is_cut_off or _is_mostly_utf8(sample):
        return _mend_lines(path, sample, is_cut_off, packer)
    return (
        f"its encoding could not be recognized; {_convert(path, 'ENCODING', packer)}\n"
        "with the encoding's name, which iconv -l lists, for ENCODING."
    )


def _mend_lines(path: Location, sample: bytes, is_cut_off: bool, packer: Packer | None) -> str:
    lines = sample.split(b"\n")
    # The first and the last line of a long sample may be cut off.
    lines = lines[1:-1] if len(sample) >= SAMPLE_BYTES // 2 else lines
    others = [line for line in lines if _num_broken(line.decode(errors="surrogateescape"))]
    new = "line.decode(errors='ignore').encode()"
    if is_cut_off:
        what = (
            "it ends within a character, as a file that was cut off does. Fetch it again, or leave out the broken bytes"
        )
    elif (encoding := encoding_of(b"\n".join(others))) is not None:
        what = f"most of it is UTF-8, but some lines look like {encoding.name} ({encoding.language}). Convert those"
        new = f"line.decode('{encoding.name}').encode()"
    else:
        what = "most of it is UTF-8. Leave out such documents with data.max_broken_fraction=0.01, or the broken bytes"
    program = (
        "import sys; [sys.stdout.buffer.write(line if line.decode(errors='ignore').encode() == line else "
        f"{new}) for line in sys.stdin.buffer]"
    )
    return f"{what} with\n  {_piped(path, f'{_PYTHON} -c {shlex.quote(program)}', packer)}"


def encoding_of(sample: bytes) -> Encoding | None:
    """Returns the encoding that bytes are likely to be in, or None if it is UTF-8 or cannot be recognized."""
    if (found := _by_nul_bytes(sample) or _likeliest(sample, _MULTIBYTE, _LEAST_SHARE)) is not None:
        return found
    if _is_mostly_utf8(sample) or b"\0" in sample:
        return None
    # Western letters beyond ASCII stand between ASCII letters; letters of other scripts follow one another.
    num_other = len(re.findall(rb"[\x80-\xff]", sample))
    if len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", sample)) * 2 < num_other:
        return _likeliest(sample, _SINGLE_BYTE, 2 * _LEAST_SHARE)
    # Windows' encoding has quotation marks and dashes where Latin-1 has control characters, and five gaps.
    is_windows = re.search(rb"[\x80-\x9f]", sample) and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", sample)
    return Encoding("CP1252" if is_windows else "LATIN1", "Western European") if num_other else None


def _by_nul_bytes(sample: bytes) -> Encoding | None:
    """Returns the encoding of two or four bytes a character that has NUL bytes in these places, if there is one."""
    in_place = [sample[place::4].count(0) for place in range(4)]
    if sum(in_place) > 0.8 * len(sample):
        return None  # No text has this many NUL bytes.
    least = 0.9 * len(sample) / 4  # NUL bytes in a place where all characters have one.
    wide = {"UTF-32LE": in_place[2:], "UTF-32BE": in_place[:2]}
    for name, nuls in wide.items():
        if len(sample) >= 8 and min(nuls) >= least:
            return Encoding(name, "by its NUL bytes")
    even, odd = in_place[0] + in_place[2], in_place[1] + in_place[3]
    # Blanks and line ends have one in any script.
    if max(even, odd) >= max(len(sample) / 100, 2) and max(even, odd) >= 0.95 * (even + odd):
        return Encoding("UTF-16LE" if odd > even else "UTF-16BE", "by its NUL bytes")
    return None


def _likeliest(sample: bytes, encodings: tuple[tuple[str, str, str], ...], least: float) -> Encoding | None:
    shares = [_share_of_common(sample.decode(codec, "replace"), _COMMON[of]) for codec, _, of in encodings]
    best = max(range(len(encodings)), key=shares.__getitem__)
    return Encoding(*encodings[best][1:]) if shares[best] >= least else None


def _share_of_common(text: str, common: str) -> float:
    """Returns the share of common characters among the characters beyond ASCII; 0 if the text is broken."""
    other = re.sub("[\0-\x7f]", "", text)
    # The sample may begin and end within a character.
    if not other or other.count("\ufffd") - 2 > _MOST_BROKEN * len(other):
        return 0.0
    return sum(map(other.count, common)) / len(other)


def _is_mostly_utf8(sample: bytes) -> bool:
    text = sample.decode(errors="surrogateescape")
    num_right = len(re.findall("[^\0-\x7f\udc80-\udcff]", text))
    # Text in another encoding also has bytes that happen to be a character of UTF-8: one for 20 that are not.
    return num_right > 0 and 3 * num_right >= _num_broken(text)


def _num_broken(text: str) -> int:
    return len(re.findall("[\udc80-\udcff]", text))


def _suffix(path: Location) -> str:
    return Path(path.name[: len(path.name) - _num_packed_chars(path)].lower()).suffix


def _num_packed_chars(path: Location) -> int:
    """Returns the length of the end of a name that says how the file is packed."""
    packer = packer_of_name(path)
    return 0 if packer is None else len(_PACKER_SUFFIXES[packer])


def _shown(path: Location) -> str:
    """Returns a file's name for a command. A file in a store has to be copied here first, so it is named without it."""
    return path.name if isinstance(path, Url) else str(path)


def _quoted(path: Location, more: str = "") -> str:
    return _word(_shown(path) + more)


def _word(text: str) -> str:
    """Returns a word of a shell's command; a name that is not UTF-8 is written in the escapes of bash and zsh."""
    name = os.fsencode(text)
    try:
        return shlex.quote(name.decode())
    except UnicodeDecodeError:
        spelled = (
            chr(byte) if re.match("[ -~]", chr(byte)) and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in name
        )
        return f"$'{''.join(spelled)}'"


def _convert(path: Location, encoding: str, packer: Packer | None) -> str:
    command = _piped(path, f"iconv -f {encoding} -t UTF-8", packer)
    return f"convert {'a copy of ' if isinstance(path, Url) else ''}it to UTF-8 with\n  {command}"


def _piped(path: Location, command: str, packer: Packer | None) -> str:
    """Returns a command that replaces a file by the output of another command, unless that command fails."""
    name, raw, new = (_quoted(path, more) for more in ("", ".raw", ".utf8"))
    if packer is not None:
        pack = f"{packer} -c < {new} > {name}"
        return f"{packer} -dc < {name} > {raw} && {command} < {raw} > {new} && {pack} && rm {raw} {new}"
    return f"{command} < {name} > {new} && mv {new} {name}"


def _unpack(path: Location, tool: str, options: str = "") -> str:
    name, suffix = _shown(path), _UNPACKED_SUFFIXES[tool]
    command = f"{tool} -d {'--rm -q ' if tool == 'zstd' else ''}{options}"
    if name.endswith(suffix):
        plain = name[: -len(suffix)]
        return f"unpack it with\n  {command}{_word(name)}\nand name {plain}."
    return f"unpack it with\n  mv {_quoted(path)} {_quoted(path, suffix)} && {command}{_quoted(path, suffix)}"


def _as_parquet(path: Location, packer: Packer | None) -> str:
    name = _shown(path)
    stem = name[: len(name) - _num_packed_chars(path)]
    target = stem if stem.lower().endswith(".parquet") else f"{stem}.parquet"
    if packer is None:
        return (
            f"{path}: a Parquet file, by its first bytes; give it its right name:\n  mv {_word(name)} {_word(target)}"
        )
    return (
        f"{path}: a Parquet file, by its first bytes; unpack it with\n  {packer} -dc < {_word(name)} > {_word(target)}"
        f"\nand name {target}."
    )


def _as_json_lines(path: Location, kind: str, what: str, packer: Packer | None) -> str:
    name = _shown(path)
    stem = name[: len(name) - _num_packed_chars(path)]
    stem = stem[: len(stem) - len(_suffix(path))] if _suffix(path) else stem
    target = f"{stem}.jsonl"
    # A file is replaced by its own lines only: a.jsonl beside a.csv is another one.
    while target != name and os.path.lexists(target):
        target = f"{target.removesuffix('.jsonl')}-2.jsonl"
    new, raw = _word(f"{target}.new"), _word(f"{target}.raw")
    program = f"{_PYTHON} -c {shlex.quote(_TO_JSON_LINES[kind])}"
    if packer is None:
        command = f"{program} < {_quoted(path)} > {new}"
    else:  # With a pipe, the file would be made of the part before a fault in the packed one.
        command = f"{packer} -dc < {_quoted(path)} > {raw} && {program} < {raw} > {new} && rm {raw}"
    move = f"mv {'' if target == name else '-n '}{new} {_word(target)}"
    return (
        f"{path}: {what}; make it JSON Lines with:\n  {command} && {move}\n"
        f"and name {target}, and in data.text_field the field that holds the text."
    )
