#!/usr/bin/env python3
"""Does in an empty folder what a new user does in the first hour, with the commands of README.md.

    scripts/first_hour.py FOLDER [--english FILE] [--korean FILE] [--steps N]

It clones this checkout into FOLDER/trainer, runs the quickstart, trains on an English and a Korean text, looks at the
curves in TensorBoard, kills a run and resumes it, writes, evaluates on a file, exports, and loads the export in a
process that cannot import trainer. It stops at the first command that fails, and prints the time of each.

By default the English text is made of the lines of docs/, and the Korean text of those of README.ko.md. --steps
shortens the quickstart and both runs; without it they are as long as README says. The programs see an environment
without this checkout, and a home folder of their own.
"""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SAVED_MODEL_WITHOUT_TRAINER = "import sys; sys.modules['trainer'] = None\n"


class Walk:
    """The folder in which a new user works, and what is run there.

    Args:
        folder: the folder to make.
        texts: a text file of the user's own for each language.
        steps: the most steps of a run; None: as many as README says.
    """

    def __init__(self, folder: Path, texts: dict[str, Path], steps: int | None) -> None:
        self.home = folder / "home"
        self.clone = folder / "trainer"
        self.texts = texts
        self.overrides = [] if steps is None else [f"train.total_steps={steps}"]
        self.home.mkdir(parents=True)
        kept = ("PATH", "LANG", "LC_ALL", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TRAINER_PYTHON")
        self.environ = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(self.home)}

    def run(self, command: str | list[str], input_text: str = "") -> str:
        """Runs a command in the clone, prints its last line, and returns its output; ends the walk if it fails."""
        words = shlex.split(command) if isinstance(command, str) else command
        print(f"   $ {shlex.join(words)[:150]}", flush=True)
        done = subprocess.run(
            words, cwd=self.clone, env=self.environ, input=input_text, capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
            sys.exit(f"exit status {done.returncode}: {shlex.join(words)}")
        for line in [*done.stderr.strip().splitlines()[-2:], *lines[-1:]]:
            print(f"     {line[:150]}", flush=True)
        return done.stdout

    def readme(self, language: str) -> list[str]:
        """Returns the blocks of code of README.md that are in a language."""
        return re.findall(rf"^```{language}\n(.*?)^```$", (self.clone / "README.md").read_text(), flags=re.M | re.S)

    # The steps, in their order.

    def clone_it(self) -> None:
        """Clones the checkout."""
        subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(self.clone)], check=True)

    def quickstart(self) -> None:
        """Runs the two commands that README begins with."""
        first, second = self.readme("sh")[0].strip().splitlines()
        self.run([*shlex.split(first), *self.overrides])
        assert "Once upon a time" in self.run(second)
        self.run(".venv/bin/trainer doctor")

    def own_texts(self) -> None:
        """Saves README's config for each text, and trains, with a kill -9 and a resumption in the English run."""
        for language, text in self.texts.items():
            config = self.readme("toml")[0].replace("YOUR.txt", str(text))
            (self.clone / f"{language}.toml").write_text(config)
            train, generate, _ = self.readme("sh")[1].replace("mine", language).strip().splitlines()
            words = [*shlex.split(train), *self.overrides, "checkpoint.every_steps=10", "log.every_steps=10"]
            if language == "english":
                self.killed(words)
                words = [*words[:2], "--resume", f"runs/{language}"]
            self.run(words)
            self.run(generate.replace("PROMPT", text.read_text()[:12].splitlines()[0]))

    def killed(self, words: list[str]) -> None:
        """Starts a command, and kills it when the run has a checkpoint."""
        print(f"   $ {shlex.join(words)} # killed at its first checkpoint", flush=True)
        process = subprocess.Popen(words, cwd=self.clone, env=self.environ, stdout=subprocess.DEVNULL)
        while not list((self.clone / "runs/english/checkpoints").glob("step_*")):
            if process.poll() is not None:
                sys.exit(f"exit status {process.returncode} before the first checkpoint: {shlex.join(words)}")
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def tensorboard(self) -> None:
        """Starts TensorBoard, and reads from it the runs that it shows."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = self.readme("sh")[1].strip().splitlines()[2]
        print(f"   $ {command}", flush=True)
        words = [*shlex.split(command), "--port", str(port)]
        server = subprocess.Popen(words, cwd=self.clone, env=self.environ, stderr=subprocess.DEVNULL)
        try:
            shown = self.wait_for(f"http://127.0.0.1:{port}/data/plugin/scalars/tags")
        finally:
            server.terminate()
            server.wait()
        for name in ("quickstart", *self.texts):
            assert shown[f"{name}/logs/train"] and shown[f"{name}/logs/validation"], shown
        print(f"     {', '.join(shown)}")

    def wait_for(self, address: str) -> dict[str, dict[str, object]]:
        """Returns what a server answers once it has found a run."""
        for _ in range(120):
            try:
                with urllib.request.urlopen(address, timeout=10) as answer:
                    if shown := json.load(answer):
                        return shown
            except OSError:
                pass
            time.sleep(0.5)
        sys.exit(f"{address} did not answer")

    def use_it(self) -> None:
        """Evaluates on a file, exports, and loads the export without trainer, with the program that export prints."""
        held_out = self.clone / "README.md"
        assert "bits per byte" in self.run(f".venv/bin/trainer evaluate runs/english --data {held_out.name}")
        printed = self.run(".venv/bin/trainer export runs/english --to savedmodel")
        program = printed.partition("To load it:\n\n")[2]
        assert "saved_model.load" in program, printed
        self.run([".venv/bin/python", "-c", SAVED_MODEL_WITHOUT_TRAINER + program])

    def into_hugging_face(self) -> None:
        """Trains the tuned config that README names, exports it to Hugging Face, and reads that folder."""
        text = f"data.train={self.texts['english']}"
        steps = self.overrides or ["train.num_epochs=1"]
        self.run([".venv/bin/trainer", "train", "configs/own_text.toml", "run_folder=runs/tuned", text, *steps])
        self.run(".venv/bin/trainer export runs/tuned --to huggingface --output tuned-huggingface")
        self.run('.venv/bin/trainer generate tuned-huggingface "The "')

    def from_python(self) -> None:
        """Runs README's program."""
        self.run([".venv/bin/python", "-c", self.readme("python")[0]])


def steps_of(walk: Walk) -> Iterator[Callable[[], None]]:
    """Yields the steps of a new user, in order."""
    yield walk.clone_it
    yield walk.quickstart
    yield walk.own_texts
    yield walk.tensorboard
    yield walk.use_it
    yield walk.into_hugging_face
    yield walk.from_python


def main() -> None:
    """Walks through all steps, and prints the time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a folder that does not exist")
    parser.add_argument("--english", type=Path, metavar="FILE")
    parser.add_argument("--korean", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, metavar="N", help="the most steps of each run")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name a new folder")
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    texts = {"english": options.english, "korean": options.korean}
    pages = {"english": sorted((CHECKOUT / "docs").glob("*.md")), "korean": [CHECKOUT / "README.ko.md"]}
    for language in texts:
        if texts[language] is None:
            texts[language] = folder / f"{language}.txt"
            lines = [line for page in pages[language] for line in page.read_text().splitlines() if line.strip()]
            # Each line after each of four others: one page has too few lines to hold some out.
            texts[language].write_text(
                "\n".join(a + b for i in range(1, 5) for a, b in zip(lines, lines[i:], strict=False))
            )
    walk = Walk(folder, {language: file.resolve() for language, file in texts.items()}, options.steps)
    for step in steps_of(walk):
        print(f"== {step.__name__}", flush=True)
        started = time.monotonic()
        step()
        print(f"   {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
