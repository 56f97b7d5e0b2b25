"""What the verb `generate` does beyond a call of the library: a file of prompts, JSON, streams, and a prompt loop.

It loads no TensorFlow, so that a mistake in the prompts is reported at once.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.decoding.request import Request
from trainer.errors import UserError
from trainer.system.progress import Bar, shown
from trainer.system.signals import watched
from trainer.system.storage import Location, locate
from trainer.system.terminal import printable, say, show, warn
from trainer.text.files import parts_of, read_documents
from trainer.text.formats import is_json_lines, is_table
from trainer.text.tables import read_table

if TYPE_CHECKING:
    from trainer.decoding.generate import Generator
    from trainer.decoding.writing import Text


def read_prompts(path: str) -> list[str]:
    """Returns the prompts in a file: its lines, or the field or column "prompt" if its name is that of JSON Lines or of
    a table. Blank lines are left out.

    Raises:
        UserError: the file cannot be read, has no prompt, or a record has none.
    """
    location = locate(path)
    if is_table(location):
        lines = _column_of_prompts(location)
    else:
        lines = ["".join(parts_of(document)) for document in read_documents(location, "line")]
    if not lines:
        raise UserError(
            f"{path} has no prompt: it is empty, a pipe, or all of its lines are blank; give a file with a prompt on "
            "each line."
        )
    if not is_json_lines(location):
        return lines
    return [_prompt_of(line, f"{path}: record {number}") for number, line in enumerate(lines, start=1)]


def _column_of_prompts(path: Location) -> list[str]:
    prompts = []
    try:
        for prompt in read_table(path, "prompt"):
            if isinstance(prompt, ValueError):
                raise UserError(f"{path}: {prompt}; mend it.")
            if prompt and not prompt.isspace():
                prompts.append(prompt)
    except UserError as error:  # The column has this name, whatever data.text_field is.
        raise UserError(
            str(error).replace("data.text_field='prompt'", '"prompt"').split(": name a column")[0]
        ) from None
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); write a record on each line, or name the file .txt.") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{place} has no text in "prompt"; write {{"prompt": "..."}} on each line.')
    return prompt


def as_json(text: "Text", request: Request) -> str:
    """Returns a text with what is known about it as a line of JSON, which cannot control a terminal."""
    seed = request.seed if request.decoder.is_random else None
    record = {"prompt": text.prompt, "text": text, **vars(text), "sampler": request.decoder.name, "seed": seed}
    line = json.dumps(record, ensure_ascii=False)
    return "".join(each if printable(each) == each else json.dumps(each)[1:-1] for each in line)


def write_texts(generator: "Generator", prompts: Sequence[str], request: Request, is_json: bool = False) -> None:
    """Prints the texts of prompts: a single one as it is made, if standard output is a terminal and beam search does
    not choose it at its end; JSON after each batch.

    Raises:
        UserError: see `Generator.generate`.
    """
    for remark in generator.remarks(prompts, request):
        warn(f"warning: {remark}")
    if len(prompts) == 1 and request.is_stream and sys.stdout.isatty() and not is_json:
        for piece in generator.stream(prompts[0], request):
            show(printable(piece))
        show("\n")
        return
    num_texts = len(prompts) * request.num_samples
    with shown(warn, "writing", num_texts) if num_texts > 1 else contextlib.nullcontext(Bar("")) as bar:
        texts = []
        for text in generator.texts(prompts, request):
            texts.append(text)
            bar.note(len(texts), num_texts)
            if is_json:
                show(as_json(text, request) + "\n")
    if not is_json:
        say("\n\n".join(texts))


def answer_prompts(generator: "Generator", request: Request) -> None:
    """Asks for prompts at the terminal and continues each of them, until Ctrl-D. Ctrl-C ends a text.

    Each prompt has a seed of its own, the next one, so that the same prompt gives other texts.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Lets `input` edit a line, and bring back earlier ones.

    warn("Write a prompt; an empty one begins a new text. Ctrl-C ends a text, Ctrl-D the program.")
    # Until here Ctrl-C ended the process at once.
    with watched([signal.SIGINT], lambda _: True, signal.default_int_handler):
        for seed in itertools.count(request.seed):
            try:
                write_texts(generator, [input("> ")], dataclasses.replace(request, seed=seed))
            except EOFError:
                show("\n")
                return
            except KeyboardInterrupt:
                show("\n")
            except UserError as error:
                warn(f"trainer: {error}")
