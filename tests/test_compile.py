"""Every config for a TPU or GPU compiles with that device's own compiler and fits its memory, on any machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = {
    "gpt2_124m_8gpu": "gpu:a100:8",
    "gpt2_124m_tpu_v5e_8": "tpu:v5e:2x4",
    "gpt2_350m_tpu_v4_32": "tpu:v4:2x2x4",
}


def compile_step(*arguments):
    command = [str(ROOT / "scripts" / "compile_step"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_every_config_for_an_accelerator_has_a_target():
    configs = {path.stem for path in (ROOT / "configs").glob("*.toml") if re.search("tpu|gpu", path.stem)}
    assert configs == set(TARGETS)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("name", TARGETS)
def test_the_config_compiles_and_fits(name):
    process = compile_step(f"configs/{name}.toml", TARGETS[name])
    if "The package index cannot be reached" in process.stderr:
        pytest.skip("no package index to take the compiler from")
    assert process.returncode == 0, process.stdout[-1000:] + process.stderr[-3000:]
    share = re.search(r"together (\d+)% of its", process.stdout)
    assert share, process.stdout
    assert 5 < int(share[1]) <= 100


def test_a_target_that_is_not_one_is_said():
    process = compile_step("configs/gpt2_124m_8gpu.toml", "cpu:x:1")
    assert process.returncode != 0
    assert "cpu:x:1 is not a target; write tpu:GENERATION:TOPOLOGY or gpu:NAME:COUNT" in process.stderr
