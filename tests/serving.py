"""A server of this machine in place of those that texts are fetched from."""

import contextlib
import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path


def zip_like_simplebooks(path: Path) -> Path:
    """Writes a small archive with SimpleBooks' layout."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for size in (2, 92):
            for split in ("train", "valid"):
                archive.writestr(f"simplebooks/simplebooks-{size}-raw/{split}.txt", f"{split} of {size}")
    return path


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yields the address of a folder."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
