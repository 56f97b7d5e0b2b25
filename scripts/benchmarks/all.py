#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Runs the benchmarks that need no accelerator, one after the other.

    scripts/benchmarks/all.py [--quick] [--only input run] [--json OUT]

The benchmarks are the programs decoding.py, input.py, prepare.py, run.py and step.py beside this one. If one fails, the
others still run; then the exit status is 1, and the last lines name those that failed. OUT holds the figures of each
benchmark under its name, and is written again after each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# gpu.py needs a GPU, and tutorial.py a text.
NAMES = ("decoding", "input", "prepare", "run", "step")
# The part of prepare.py that is left out, scale, tests memory and takes long.
ARGUMENTS = {"prepare": ("--only", "speed", "vocabulary")}


def run_all(names: Sequence[str], arguments: Sequence[str], out: Path | None, folder: Path = FOLDER) -> list[str]:
    """Runs benchmarks in turn, and returns a line for each that failed.

    Args:
        names: the benchmarks to run; what they print is printed.
        arguments: the arguments that each of them gets.
        out: the file to write their figures to.
        folder: the folder that holds the benchmarks.
    """
    figures: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            print(f"== {name}", flush=True)
            file = Path(temporary) / f"{name}.json"
            program = str(folder / f"{name}.py")
            command = [sys.executable, program, *ARGUMENTS.get(name, ()), *arguments, "--json", str(file)]
            status = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode
            if status:
                failures.append(f"{name} failed: exit status {status}")
            # A benchmark that fails may have written figures before.
            if file.is_file():
                figures[name] = json.loads(file.read_text())
            if out is not None:
                out.write_text(json.dumps({"benchmarks": figures, "failures": failures}, indent=2) + "\n")
    return failures


def main() -> None:
    """Runs the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmarks work")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="the benchmarks to run (all)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    options = parser.parse_args()
    if failures := run_all(options.only, ["--quick"] if options.quick else [], options.json):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
