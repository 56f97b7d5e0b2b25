"""Where a tokenizer comes from: a folder that keeps one, a text to learn it from, or the file of tokenizer.path."""

import collections
import itertools
import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from trainer.config.settings import (
    BpeConfig,
    BpeFileConfig,
    CharConfig,
    SavedTokenizerConfig,
    TokenizerConfig,
    WordPieceConfig,
    WordPieceFileConfig,
)
from trainer.errors import UserError
from trainer.system.storage import Location, locate, on_disk
from trainer.text.files import Document, parts_of
from trainer.text.formats import SAMPLE_BYTES, START_BYTES, fault_of_bytes, fault_of_start
from trainer.tokenizers.bpe import BpeTokenizer, check_round_trip
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.tokenizer import Tokenizer, parse_tokenizer_json
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS, train_bpe, train_wordpiece

# The file of a saved tokenizer that names its kind and its fingerprint.
SETTINGS = "settings.json"
# The vocabulary of a KerasHub preset.
PRESET_VOCABULARY = "vocabulary.json"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer that `Tokenizer.save` wrote into a folder.

    Raises:
        UserError: a file is missing or damaged, or the vocabulary is not the saved one.
    """
    folder = Path(folder)
    tokenizer: Tokenizer
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        if settings["kind"] == "wordpiece":
            lines = (folder / "vocab.txt").read_bytes().decode().split("\n")[:-1]  # A token may hold \r.
            tokenizer = _wordpiece(lines, settings["lowercase"])
        elif settings["kind"] == "bpe":
            tokenizer = BpeTokenizer((folder / "tokenizer.json").read_bytes().decode())
        elif settings["kind"] == "byte":
            tokenizer = ByteTokenizer()
        else:
            ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
            tokenizer = CharTokenizer(sorted(ids, key=ids.get))
        saved = str(settings["fingerprint"])
    except Exception as error:  # A damaged file can make these libraries raise anything.
        raise UserError(
            f"{folder}: not a whole tokenizer ({error!r:.300}); delete the folder that holds it and prepare again."
        ) from None
    if tokenizer.fingerprint != saved:
        raise UserError(
            f"{folder}: the tokenizer has fingerprint {tokenizer.fingerprint[:10]}, but {saved:.10} was saved, so a "
            "file was changed. Restore it, or delete the folder that holds it and prepare again."
        )
    return tokenizer


def train_tokenizer(config: TokenizerConfig, documents: Iterable[Document]) -> Tokenizer:
    """Makes the tokenizer that a config sets: from documents, read once, or from a file.

    Raises:
        UserError: the vocabulary is too small for the characters of the text, or tokenizer.path cannot be used.
    """
    if isinstance(config, SavedTokenizerConfig):
        return _saved(config)
    if isinstance(config, WordPieceFileConfig | BpeFileConfig):
        return _from_file(config)
    if isinstance(config, WordPieceConfig):
        return _wordpiece(train_wordpiece(config, documents), config.lowercase)
    if isinstance(config, BpeConfig):
        return BpeTokenizer(train_bpe(config, documents))
    if isinstance(config, CharConfig):
        characters: set[str] = set()
        for part in itertools.chain.from_iterable(map(parts_of, documents)):
            characters.update(part)
        return CharTokenizer([*SPECIAL_TOKENS, *sorted(characters)])
    return ByteTokenizer()


def read_tokenizer_file(config: TokenizerConfig) -> bytes | None:
    """Returns the content of the file that tokenizer.path names, or None if the config names none. In a run's folder
    the file is the one that has the tokenizer's fingerprint.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(config, WordPieceFileConfig | BpeFileConfig | SavedTokenizerConfig):
        return None
    path = locate(config.path)
    if isinstance(config, SavedTokenizerConfig):
        path = _saved_file(config)
    try:
        # A pipe would have to be read more than once, and a device may have no end.
        if isinstance(path, Path) and stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"tokenizer.path={config.path!r} is not a file; write its content into one, and name that.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path={config.path!r}: cannot be read: {error.strerror or error}.") from None


def _saved_file(config: SavedTokenizerConfig) -> Location:
    """Returns the file that shows which tokenizer a folder holds."""
    folder = locate(config.path)
    of_preset = folder / "assets" / "tokenizer" / PRESET_VOCABULARY
    for file in (folder / "tokenizer" / SETTINGS, folder / SETTINGS, of_preset, folder / "tokenizer.json"):
        if file.is_file():
            return file
    raise UserError(
        f"tokenizer.path={config.path!r} has no tokenizer: it is neither a run's folder, which has a tokenizer/, nor a "
        "folder with a tokenizer.json of Hugging Face. Give one of these, or another tokenizer.kind and tokenizer.path."
    )


def _saved(config: SavedTokenizerConfig) -> Tokenizer:
    file = _saved_file(config)
    if file.name == PRESET_VOCABULARY:
        return _of_preset(config, file)
    if file.name != SETTINGS:
        return _from_file(BpeFileConfig(kind="bpe", path=str(file)))
    folder = locate(str(file).removesuffix(f"/{SETTINGS}"))
    with on_disk(folder) as copy:
        try:
            return load_tokenizer(copy)
        except UserError as error:
            raise UserError(f"tokenizer.path={config.path!r}: {str(error).partition('; delete')[0]}.") from None


def _of_preset(config: SavedTokenizerConfig, vocabulary: Location) -> Tokenizer:
    """Returns the byte-level BPE of a KerasHub preset; words are split as by GPT-2."""
    merges = locate(str(vocabulary).replace(PRESET_VOCABULARY, "merges.txt"))
    try:
        lines = merges.read_text("utf-8").split("\n")
        pairs = [(first, last) for first, _, last in (line.partition(" ") for line in lines) if last]
        pairs = pairs[lines[0].startswith("#version") :]
        twin = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocabulary.read_text("utf-8")), pairs))
        twin.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        twin.decoder = tokenizers.decoders.ByteLevel()
        tokenizer = BpeTokenizer(twin.to_str())
        check_round_trip(tokenizer)
    except Exception as error:  # The library raises nothing more precise.
        raise UserError(f"tokenizer.path={config.path!r}: {vocabulary} is not byte-level BPE: {error}.") from None
    return tokenizer


def _wordpiece(vocabulary: list[str], lowercase: bool) -> Tokenizer:
    # Here and not at the top: only WordPiece needs TensorFlow, which takes seconds to load.
    from trainer.tokenizers.wordpiece import WordPieceTokenizer

    return WordPieceTokenizer(vocabulary, lowercase)


def _from_file(config: WordPieceFileConfig | BpeFileConfig) -> Tokenizer:
    content, needed = read_tokenizer_file(config), "a tokenizer.json of byte-level BPE, such as GPT-2's"
    assert content is not None
    text = _text_of(content, config)
    try:
        if isinstance(config, BpeFileConfig):
            tokenizer = BpeTokenizer(text)
            check_round_trip(tokenizer)
            return tokenizer
        needed = "a vocab.txt or tokenizer.json of WordPiece, such as BERT's"
        return _wordpiece(_wordpiece_vocabulary(text, config), config.lowercase)
    except (ValueError, RuntimeError) as error:  # tensorflow_text raises the latter.
        raise UserError(f"tokenizer.path={config.path!r}: {error}; give {needed}.") from None


def _text_of(content: bytes, config: WordPieceFileConfig | BpeFileConfig) -> str:
    """Returns the text of a file that tokenizer.path names."""
    path, place = locate(config.path), content.find(0)
    if (fault := fault_of_start(path, content[:START_BYTES], packer=None)) is None:
        what = "NUL byte"
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what, place = "not UTF-8", error.start
        if place < 0:
            return text
        advice = fault_of_bytes(path, content[:SAMPLE_BYTES], is_cut_off=False, packer=None)
        fault = f"{path}: {what} at byte offset {place}; {advice}"
    raise UserError(f"tokenizer.path={config.path!r}: {fault.removeprefix(f'{path}: ')}")


def _wordpiece_vocabulary(file: str, config: WordPieceFileConfig) -> list[str]:
    if Path(config.path).suffix.lower() == ".json":
        ids = parse_tokenizer_json(file, "WordPiece").get_vocab()
        vocabulary = sorted(ids, key=ids.__getitem__)
    else:
        vocabulary = _listed(file)
    counts = collections.Counter(vocabulary)
    if twice := next((token for token, count in counts.items() if count > 1), None):
        raise ValueError(f"the token {twice!r} is there twice")
    capitals = [token for token in vocabulary if re.search("[A-Z]", token) and not re.fullmatch(r"\[.*\]", token)]
    if config.lowercase and capitals:
        raise ValueError(
            f"{len(capitals)} tokens have capitals, such as {capitals[0]!r}, which no text has with "
            "tokenizer.lowercase=true; set that to false"
        )
    return vocabulary


def _listed(file: str) -> list[str]:
    """Returns the tokens of a vocab.txt: one on each line, or one and its id, after a blank or tab."""
    lines = [line.strip("\t\r\f") for line in file.rstrip("\n").split("\n")]
    while lines and not lines[-1].strip(" "):
        del lines[-1]
    numbered = [re.fullmatch(r"([^ \t]+)[ \t]+([^ \t]+) *", line) for line in lines]
    if all(numbered):
        ids = {each[2]: each[1] for each in numbered if each}
        wanted = [str(id) for id in range(len(lines))]
        if ids.keys() != set(wanted):
            raise ValueError(f"the numbers after its {len(lines)} tokens are not 0 to {len(lines) - 1}, each once")
        return [ids[id] for id in wanted]
    for number, line in enumerate(lines, start=1):
        if not line or re.search("[\t\r\f]", line):
            raise ValueError(
                f"line {number}, {line[:80]!r}, is not a token: it is empty, or holds a tab or a line's end"
            )
    # A word may hold a blank, because folding turns a no-break space into one. Other blanks at the end of a line are
    # not part of the token.
    tokens = set(lines)
    bare = [line.rstrip(" ") for line in lines]
    return [
        line if token.removeprefix("##") == "" or token in tokens else token
        for line, token in zip(lines, bare, strict=True)
    ]
