"""Laws of the facts about this machine."""

import os
from pathlib import Path

import pytest

from trainer.system.machine import describe_cpu, num_cores


def test_only_the_cores_count_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5}, raising=False)
    assert num_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # As on macOS.
    assert num_cores() == 7


@pytest.mark.parametrize(
    ("flags", "widest"),
    [
        ("fpu avx2 avx512f amx_bf16", " with AMX"),
        ("avx2 avx512f", " with AVX-512"),
        ("avx2", " with AVX2"),
        ("fpu", ""),
    ],
)
def test_a_cpu_is_named_by_its_cores_and_its_widest_instructions(tmp_path: Path, flags: str, widest: str):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    cores = f"{num_cores()} CPU core{'s' if num_cores() > 1 else ''}"
    assert describe_cpu(cpuinfo) == cores + widest
    assert describe_cpu(tmp_path / "macos") == cores
