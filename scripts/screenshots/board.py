"""TensorBoard as a server on this machine, for programs that look at its pages."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served(logs: Path) -> Iterator[str]:
    """Yields the address at which TensorBoard shows the runs below a folder, and ends it."""
    program = Path(sys.executable).with_name("tensorboard")
    # The page shows the folder as it is given.
    command = [str(program), f"--logdir={logs.name}", "--port=0", "--host=localhost", "--reload_interval=1"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=logs.parent
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"http://localhost:\d+/", line):
                    yield found[0]
                    return
            raise RuntimeError("TensorBoard has not started.")
        finally:
            process.terminate()
