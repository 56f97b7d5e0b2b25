"""Laws of scripts/launch/sky.yaml, SkyPilot's example: it has only SkyPilot's fields, and its run starts workers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config.file import load_config
from trainer.distributed.workers import find_workers, read_tf_config

ROOT = Path(__file__).parents[1]
TASK = yaml.safe_load((ROOT / "scripts/launch/sky.yaml").read_text(encoding="utf-8"))

# The fields of SkyPilot 0.14.1 (sky/utils/schemas.py) that the example could have, and the types of their values.
TASK_FIELDS = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": dict,
    "file_mounts": dict,
    "envs": dict,
    "secrets": dict,
    "setup": str,
    "run": str,
}
RESOURCES_FIELDS = {
    "accelerators": str,
    "infra": str,
    "cpus": str,
    "memory": str,
    "use_spot": bool,
    "disk_size": int,
    "image_id": str,
    "job_recovery": dict,
}


def test_the_example_has_only_fields_that_skypilot_knows():
    for fields, values in ((TASK_FIELDS, TASK), (RESOURCES_FIELDS, TASK["resources"])):
        assert all(type(value) is fields[name] for name, value in values.items())
    # Without a value they have to be given on the command line.
    assert TASK["envs"] == dict.fromkeys(("OUTPUT", "PREPARED", "DATA"))
    assert TASK["secrets"] == {"TRAINER_MEETING_SECRET": None}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_starts_the_worker_of_its_rank_and_passes_the_text_on_unread(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
):
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "trainer").write_text('#!/bin/sh\nprintf "%s\\n" "$TF_CONFIG" "$@"\n')
    (programs / "trainer").chmod(0o755)
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "2"}
    given = {"OUTPUT": "gs://b/run", "PREPARED": "gs://b/prepared", "DATA": "gs://b/*.gz"}
    done = subprocess.run(
        ["bash", "-e", "-c", TASK["run"]], cwd=tmp_path, env=os.environ | sky | given, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    tf_config, *words = done.stdout.splitlines()
    workers = read_tf_config(tf_config)
    assert (workers.addresses, workers.number) == (("10.0.0.4:2222", "10.0.0.5:2222"), rank)
    assert json.loads(tf_config)["task"]["index"] == rank
    verb, path, how, *overrides = words
    assert (verb, how) == ("train", "--or-resume")
    config = load_config(ROOT / path, overrides)
    folders = (config.run_folder, config.data.prepared_folder, config.data.train)
    assert folders == ("gs://b/run", "gs://b/prepared", ("gs://b/*.gz",))
    # With another kind than multi_worker the machines would train by themselves, into the same folder.
    monkeypatch.setenv("TF_CONFIG", tf_config)
    assert find_workers(config.distribution) == workers and workers.are_several


def test_the_setup_installs_what_the_gpu_image_has():
    make, install = TASK["setup"].splitlines()
    (oldest,) = re.findall(r"python_requires = >=(3\.\d+),", (ROOT / "setup.cfg").read_text(encoding="utf-8"))
    # Without --seed the environment would have no pip.
    assert f" --seed --allow-existing --python {oldest} .venv" in make
    dockerfile = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert '--constraint requirements.lock --constraint cuda.lock ".[cuda]"' in dockerfile
    assert "--constraint requirements.lock --constraint docker/cuda.lock --editable '.[cuda]'" in install
