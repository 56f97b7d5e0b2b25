"""The tiny config and its prepared text that tests of several modules begin with."""

from collections.abc import Mapping
from typing import Any

from trainer.config.file import make_config
from trainer.config.settings import Config
from trainer.data.prepare import prepare
from trainer.data.shards import PreparedData

# One layer: a step of it takes less time than its compilation. One sampler: each compiles a loop, for as long as
# everything else in a tiny run takes.
MODEL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
TRAIN = {"precision": "float32", "total_steps": 1}
SAMPLES = {"samplers": ["greedy"]}


def tiny_config(folder: object = "unused", *overrides: str, **sections: Mapping[str, Any]) -> Config:
    """Makes a config whose run is run/ in a folder, and whose prepared data go into prepared/ there.

    Args:
        folder: the folder, or a URL.
        overrides: settings as on a command line, which replace others.
        sections: settings by section, which are added to MODEL, TRAIN, SAMPLES and the folder of prepared data.
    """
    data = {"prepared_folder": f"{folder}/prepared"}
    settings: dict[str, Any] = {"data": data, "model": MODEL, "train": TRAIN, "samples": SAMPLES}
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return make_config({"run_folder": f"{folder}/run", **settings}, overrides)


def quiet(line: str) -> None:
    """Prints nothing, in place of `print`."""


def tiny_prepared(config: Config, shard_tokens: int = 1 << 27) -> PreparedData:
    """Prepares the text of a config, silently."""
    return prepare(config, quiet, shard_tokens)
