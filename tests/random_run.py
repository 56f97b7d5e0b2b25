"""A run with random weights, whose next token depends on all tokens before it, for tests of what is made of a run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.model.build import build_gpt
from trainer.runs.run_checkpoints import open_checkpoints
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder

TEXT = (
    "The cat sat on the mat; it's 1,234 o'clock.\n"
    "안녕하세요 세계, ㅋㅋㅋ 좋아요!\n"
    "Größe und Straße, naïve café ﬁn ①.\n"
    "我爱北京天安门。\n"
    "  two  spaces\tand a tab\n"
    "שלום עולם — привет мир 🙂👍🏽\n"
    "हिन्दी में ६ शब्द\n"
) * 20
SEQUENCE_LENGTH = 24
# Prompts of several lengths, scripts and ends; none has more than SEQUENCE_LENGTH - 2 bytes.
PROMPTS = [
    *(
        "",
        " ",
        "T",
        "The",
        "The cat",
        "The cat sat on",
        "it's",
        "'s",
        "1",
        "1,234",
        "naïve",
        "安",
        "我爱",
        "ㅋㅋ",
        "안녕",
    ),
    *(
        "o'clock.",
        "two  spaces",
        "  two",
        "\tand",
        "a\n",
        "\n\n",
        "שלום",
        "мир",
        "🙂",
        "६ शब",
        "Gr",
        "Größe",
        "ﬁn",
        "①",
    ),
    *(
        f"{word} {number}"
        for number in range(3)
        for word in ("cat", "on the", "sat; it", "mat.", "세계", "café", "und")
    ),
]
assert len(PROMPTS) == 50


def random_run(folder: Path, *overrides: str, seed: int = 1) -> RunFolder:
    """Makes a run with one checkpoint in a folder. Its text is TEXT."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    data = {"train": str(folder / "a.txt"), "documents": "line", "mode": "packed", "held_out_fraction": 0.1}
    train = {"total_steps": 2, "sequence_length": SEQUENCE_LENGTH, "global_batch_size": 2}
    model = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24}
    config = tiny_config(folder, *overrides, data=data, train=train, model=model, tokenizer={"kind": "byte"})
    run = RunFolder.create(config, tiny_prepared(config))
    tokenizer = load_tokenizer_of(run)
    model = build_gpt(config, tokenizer.vocabulary_size, tokenizer.bos_id)
    random = np.random.default_rng(seed)
    weights = {
        each.path: random.normal(each.path.endswith("gamma"), 0.5 if len(each.shape) == 2 else 0.1, each.shape)
        for each in model.variables
    }
    for path, value in weights.items():
        if path.endswith(("embeddings", "unembedding/kernel")):
            value[tokenizer.pad_id] = 0  # Trained models do not write padding. Other programs would, if it were likely.
    checkpoints = open_checkpoints(run)
    checkpoints.save(2, {"weights": {path: value.astype(np.float32) for path, value in weights.items()}}, {})
    checkpoints.wait()
    return run


def in_fresh_process(program: str, *arguments: str) -> str:
    """Returns what a Python program prints; warnings of its libraries are not errors."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
