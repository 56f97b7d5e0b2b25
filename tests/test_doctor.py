"""Laws of what trainer doctor finds: the cause and the repair of each staged breakage; nothing on a whole machine."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.cli import main
from trainer.commands import doctor
from trainer.commands.doctor import check_folders, examine, host_memory, need_of_text
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exit_status import ExitStatus
from trainer.hardware.checks import Machine, check_driver
from trainer.hardware.cuda import Build, Driver, Gpu, make_build
from trainer.hardware.libraries import system_folders
from trainer.hardware.library_checks import check_libraries
from trainer.hardware.processor import multiplies_bfloat16
from trainer.hardware.unused import unused_gpu
from trainer.system.findings import Finding
from trainer.system.folder_checks import Need, check_space, check_writing
from trainer.system.limits import check_memory, check_open_files, check_shared_memory, memory_limit
from trainer.system.machine import describe_cpu, read_line
from trainer.system.packages import Package, check_python
from trainer.training.checks import check_start, quick_checks

H100, RTX_5090, B200 = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA GeForce RTX 5090", (12, 0)), Gpu("NVIDIA B200", (10, 0))
GTX_980 = Gpu("NVIDIA GeForce GTX 980", (5, 2))
RECORD = {
    "is_cuda_build": True,
    "cuda_version": "12.5.1",
    "cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"],
}
WHEELS = {
    "nvidia-cuda-runtime-cu12": ("cuda_runtime", ["libcudart.so.12"]),
    "nvidia-cublas-cu12": ("cublas", ["libcublas.so.12", "libcublasLt.so.12"]),
    "nvidia-cufft-cu12": ("cufft", ["libcufft.so.11"]),
    "nvidia-cusolver-cu12": ("cusolver", ["libcusolver.so.11"]),
    "nvidia-cusparse-cu12": ("cusparse", ["libcusparse.so.12"]),
    "nvidia-nvjitlink-cu12": ("nvjitlink", ["libnvJitLink.so.12"]),
    "nvidia-cudnn-cu12": ("cudnn", ["libcudnn.so.9"]),
    "nvidia-nccl-cu12": ("nccl", ["libnccl.so.2"]),
}


def packages() -> dict[str, Package]:
    """Returns the packages of a whole installation with CUDA."""
    extra = '; extra == "and-cuda"'
    wheels = {name: Package("12.9.1") for name in WHEELS} | {
        "nvidia-cudnn-cu12": Package("9.5.0.50"),
        "nvidia-cuda-nvcc-cu12": Package("12.9.1"),
    }
    others = [f"{name}>=2{extra}" for name in wheels if name != "nvidia-cudnn-cu12"]
    requires = ("numpy>=1.26", f"nvidia-cudnn-cu12<10.0,>=9.3.0.75{extra}", *others)
    return {
        "gpt-trainer": Package("0.1.0", ("tensorflow<2.22,>=2.20", "keras<4,>=3.15", "rich; extra == 'x'"), ">=3.11"),
        "tensorflow": Package("2.21.0", requires),
        "keras": Package("3.15.1", ("numpy",)),
        "numpy": Package("2.4.6"),
        **wheels,
    }


@pytest.fixture
def whole(tmp_path: Path) -> Machine:
    """A machine with two H100 on which nothing is wrong."""
    root, site = tmp_path / "root", tmp_path / "root" / "site"
    for component, files in WHEELS.values():
        for file in files:
            touch(site / "nvidia" / component / "lib" / file)
    touch(site / "nvidia/cuda_nvcc/bin/ptxas")
    touch(site / "nvidia/cuda_nvcc/nvvm/libdevice/libdevice.10.bc")
    for number in (0, 1):
        touch(root / f"sys/bus/pci/devices/0000:0{number}:00.0/vendor", "0x10de\n")
        touch(root / f"dev/nvidia{number}")
    touch(root / "proc/driver/nvidia/version")
    touch(root / "sys/module/nvidia/version", "580.65.06\n")
    touch(root / "proc/meminfo", "MemTotal:       64000000 kB\n")
    touch(root / "proc/self/cgroup", "0::/job\n")
    touch(root / "sys/fs/cgroup/job/memory.max", "max\n")
    driver = Driver(0, (13, 0), (H100, H100))
    return Machine(packages(), make_build("2.21.0", RECORD), site, driver, root, {})


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def faults(findings: Iterator[Finding]) -> list[Finding]:
    return [each for each in findings if each.level != "ok"]


def test_nothing_is_wrong_with_a_whole_machine(whole: Machine, tmp_path: Path):
    found = list(examine(tiny_config(tmp_path), whole))
    assert not faults(iter(found))
    assert [each.check for each in found] == [
        "Python",
        "packages",
        "TensorFlow",
        "GPU",
        "driver",
        "libraries",
        "code",
        "memory",
    ]
    assert all(not each.repair for each in found)


def remove(*names: str) -> Callable[[Machine], Machine]:
    """Returns a breakage that removes files from a machine."""

    def breakage(machine: Machine) -> Machine:
        for name in names:
            (machine.root / name).unlink()
        return machine

    return breakage


def install(**versions: str | None) -> Callable[[Machine], Machine]:
    """Returns a breakage that changes the versions of packages; None: it is removed."""

    def breakage(machine: Machine) -> Machine:
        changed = dict(machine.packages)
        for key, version in versions.items():
            name = key.replace("_", "-")
            if version is None:
                del changed[name]
            else:
                changed[name] = Package(version, changed[name].requires if name in changed else ())
        return dataclasses.replace(machine, packages=changed)

    return breakage


def change(**fields: Any) -> Callable[[Machine], Machine]:
    """Returns a breakage that replaces facts of a machine."""
    return lambda machine: dataclasses.replace(machine, **fields)


def all_of(*breakages: Callable[[Machine], Machine]) -> Callable[[Machine], Machine]:
    def breakage(machine: Machine) -> Machine:
        for each in breakages:
            machine = each(machine)
        return machine

    return breakage


def shadow_cudnn(machine: Machine) -> Machine:
    touch(machine.root / "opt/old/libcudnn.so.9.1.0")
    (machine.root / "opt/old/libcudnn.so.9").symlink_to("libcudnn.so.9.1.0")
    return dataclasses.replace(machine, environ={"LD_LIBRARY_PATH": "/opt/old"})


def move_cublas(machine: Machine) -> Machine:
    touch(machine.root / "usr/local/cuda-12.5/lib64/libcublas.so.12")
    return remove("site/nvidia/cublas/lib/libcublas.so.12")(machine)


def limit_memory(machine: Machine) -> Machine:
    touch(machine.root / "sys/fs/cgroup/job/memory.max", "268435456\n")
    return machine


def unload_driver(machine: Machine) -> Machine:
    shutil.rmtree(machine.root / "proc/driver/nvidia")
    return dataclasses.replace(machine, driver=None)


TF_2_20 = make_build("2.20.0", RECORD)
# The name of each breakage, how it is made, the settings, and what the cause and the repair are.
BREAKAGES = {
    "a library is missing": (
        all_of(remove("site/nvidia/cublas/lib/libcublas.so.12"), install(nvidia_cublas_cu12=None)),
        (),
        r"^libcublas\.so\.12 is missing",
        r"install 'tensorflow\[and-cuda\]==2\.21\.0'",
    ),
    "a library is damaged": (
        remove("site/nvidia/cufft/lib/libcufft.so.11"),
        (),
        r"^libcufft\.so\.11 is missing, although its package nvidia-cufft-cu12 is installed",
        r"install --force-reinstall --no-deps 'nvidia-cufft-cu12==12\.9\.1'",
    ),
    "the path of a library is missing": (
        move_cublas,
        (),
        r"^libcublas\.so\.12 is in .*/usr/local/cuda-12\.5/lib64, where the dynamic linker does not look",
        r"export LD_LIBRARY_PATH=.*/usr/local/cuda-12\.5/lib64",
    ),
    "TensorFlow is installed without CUDA's libraries": (
        all_of(
            *(remove(f"site/nvidia/{folder}/lib/{file}") for folder, files in WHEELS.values() for file in files),
            install(**{name.replace("-", "_"): None for name in WHEELS}),
        ),
        (),
        r"^libcudart\.so\.12, .*libcublasLt\.so\.12, .*libcudnn\.so\.9, libnccl\.so\.2 are missing, and ",
        r"install 'tensorflow\[and-cuda\]==2\.21\.0'",
    ),
    "cuDNN is missing": (
        all_of(remove("site/nvidia/cudnn/lib/libcudnn.so.9"), install(nvidia_cudnn_cu12=None)),
        (),
        r"^libcudnn\.so\.9 is missing",
        r"tensorflow\[and-cuda\]==2\.21\.0",
    ),
    "cuDNN is too old": (
        install(nvidia_cudnn_cu12="9.1.0.70"),
        (),
        r"is cuDNN 9\.1\.0\.70, and TensorFlow needs 9\.3 or newer",
        r"install 'nvidia-cudnn-cu12<10\.0,>=9\.3\.0\.75'",
    ),
    "another cuDNN comes first": (
        shadow_cudnn,
        (),
        r"^libcudnn\.so\.9 in .*/opt/old is cuDNN 9\.1\.0, .*; LD_LIBRARY_PATH leads to it",
        r"unset LD_LIBRARY_PATH",
    ),
    "NCCL is missing": (
        remove("site/nvidia/nccl/lib/libnccl.so.2"),
        (),
        r"^libnccl\.so\.2 is missing",
        r"'nvidia-nccl-cu12==12\.9\.1'",
    ),
    "ptxas is missing": (
        remove("site/nvidia/cuda_nvcc/bin/ptxas"),
        (),
        r"^bin/ptxas, the assembler of XLA, is missing",
        r"tensorflow\[and-cuda\].*train\.xla=off",
    ),
    "no driver is loaded": (
        all_of(remove("dev/nvidia0", "dev/nvidia1"), unload_driver),
        (),
        r"has 2 NVIDIA GPUs, but no driver is loaded",
        r"sudo ubuntu-drivers install",
    ),
    "a container without --gpus": (
        all_of(remove("dev/nvidia0", "dev/nvidia1"), change(driver=None)),
        (),
        r"there is no /dev/nvidia0 here",
        r"docker run --gpus all",
    ),
    "a container without the driver's library": (
        change(driver=None),
        (),
        r"libcuda\.so\.1, cannot be loaded",
        r"docker run --gpus all",
    ),
    "GPUs are hidden": (
        change(driver=Driver(100, (13, 0)), environ={"CUDA_VISIBLE_DEVICES": "-1"}),
        (),
        r"CUDA_VISIBLE_DEVICES='-1' hides the GPUs",
        r"unset CUDA_VISIBLE_DEVICES",
    ),
    "the driver was updated under way": (
        change(driver=Driver(803, (13, 0))),
        (),
        r"its library and its kernel module have different versions",
        r"sudo reboot",
    ),
    "the driver is of an older CUDA": (
        change(driver=Driver(0, (11, 8), (H100, H100))),
        (),
        r"driver runs CUDA up to 11\.8, and TensorFlow 2\.21\.0 is built with 12\.5",
        r"Install driver 525\.60 or newer",
    ),
    "the driver cannot compile for this GPU": (
        change(driver=Driver(0, (12, 2), (H100, H100))),
        (),
        r"no machine code for NVIDIA H100 .*, and PTX of CUDA 12\.5, which NVIDIA's driver cannot compile: .* to 12\.2",
        r"Install driver 555\.42 or newer",
    ),
    "compute capability 12.0": (
        change(driver=Driver(0, (13, 0), (RTX_5090, RTX_5090))),
        (),
        r"has no machine code for NVIDIA GeForce RTX 5090 \(compute capability 12\.0\): XLA would abort, so the step ",
        r"CUDA_CACHE_MAXSIZE=.*a TensorFlow built with CUDA 12\.8 or newer for sm_120",
    ),
    "compute capability 10.0": (
        change(driver=Driver(0, (13, 0), (B200,))),
        ("train.xla=on",),
        r"train\.xla='on', but .* no machine code for NVIDIA B200 \(compute capability 10\.0\), and XLA would abort",
        r"Set train\.xla=off; or use a TensorFlow built with CUDA 12\.8 or newer for sm_100",
    ),
    "compute capability 12.0 with an older TensorFlow": (
        all_of(change(build=TF_2_20, driver=Driver(0, (13, 0), (RTX_5090,))), install(tensorflow="2.20.0")),
        (),
        r"^TensorFlow 2\.20\.0, .* operations fail on it \(CUDA_ERROR_INVALID_PTX\)",
        r"install 'tensorflow\[and-cuda\]>=2\.21,<2\.22'; or train on the CPU: distribution\.kind=cpu",
    ),
    "a GPU that is too old": (
        change(driver=Driver(0, (12, 5), (GTX_980,))),
        (),
        r"has no machine code for NVIDIA GeForce GTX 980 \(compute capability 5\.2\), and does not use it",
        r"distribution\.kind=cpu",
    ),
    "TensorFlow without CUDA": (
        all_of(change(build=Build("2.21.0")), install(tensorflow_cpu="2.21.0", tensorflow=None)),
        (),
        r"^tensorflow-cpu 2\.21\.0 is built without CUDA",
        r"install 'tensorflow\[and-cuda\]==2\.21\.0'",
    ),
    "two TensorFlows": (
        install(tf_nightly="2.22.0.dev20260309"),
        (),
        r"^tensorflow 2\.21\.0 and tf-nightly 2\.22\.0\.dev20260309 are installed into the same folder",
        r"uninstall -y tensorflow tf-nightly; .* install 'tensorflow==2\.21\.0'",
    ),
    "plain tensorflow over tensorflow-tpu": (
        install(tensorflow_tpu="2.20.0", libtpu="0.0.17"),
        ("distribution.kind=tpu",),
        r"^plain tensorflow is installed over tensorflow-tpu",
        r"scripts/launch/install_tpu",
    ),
    "a wrong libtpu": (
        install(tensorflow_tpu="2.20.0", tensorflow=None, libtpu="0.0.52"),
        ("distribution.kind=tpu",),
        r"^libtpu is 0\.0\.52, and tensorflow-tpu loads only 0\.0\.17",
        r"scripts/launch/install_tpu",
    ),
    "no tensorflow-tpu": (
        change(),
        ("distribution.kind=tpu",),
        r"^tensorflow-tpu is not installed",
        r"scripts/launch/install_tpu",
    ),
    "a package is too old": (
        install(keras="3.12.0"),
        (),
        r"^keras 3\.12\.0 is installed, but gpt-trainer needs keras<4,>=3\.15",
        r"install 'keras<4,>=3\.15'",
    ),
    "a package is missing": (
        install(numpy=None),
        (),
        r"^numpy is not installed, but keras needs numpy, tensorflow needs numpy>=1\.26",
        r"install 'numpy>=1\.26'",
    ),
    "little memory": (
        limit_memory,
        (),
        r"^the cgroup /job allows 268\.4 MB, and the run needs about 5\d\d\.\d MB",
        r"docker run --memory=0\.6g; sbatch --mem=614M;.*train\.micro_batch_size",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_doctor_names_the_cause_of_a_breakage_and_its_repair(name: str, whole: Machine, tmp_path: Path):
    breakage, settings, cause, repair = BREAKAGES[name]
    (found,) = faults(examine(tiny_config(tmp_path, *settings), breakage(whole)))
    assert re.search(cause, found.what) and re.search(repair, found.repair)
    # What is advised can be done.
    for requirement in re.findall(r"'([\w-]+(?:\[[\w-]+\])?[<>=][^']*)'", found.repair):
        Requirement(requirement)
    for setting in re.findall(r"\b(?:distribution|train)\.\w+=\w+", found.repair):
        tiny_config(tmp_path, setting)
    # The sentence ends once, so that a message can be made of both.
    assert not found.what.endswith(".") and not found.repair.endswith(".")


def test_what_concerns_only_gpus_is_no_error_for_a_run_that_takes_none(whole: Machine, tmp_path: Path):
    on_cpu = dataclasses.replace(whole, build=Build("2.21.0"))
    for override in ("distribution.kind=cpu", "distribution.logical_devices=2"):
        assert not faults(examine(tiny_config(tmp_path, override), on_cpu))
    hidden = dataclasses.replace(whole, driver=Driver(100, (13, 0)), environ={"CUDA_VISIBLE_DEVICES": ""})
    for kind, level in (("auto", "warning"), ("gpu", "error")):
        (found,) = faults(examine(tiny_config(tmp_path, f"distribution.kind={kind}"), hidden))
        assert (found.level, found.check) == (level, "GPU")
    assert "CUDA_VISIBLE_DEVICES='' hides the GPUs" in (unused_gpu(hidden) or "")


def test_the_memory_of_a_step_is_asked_of_the_host_only_if_its_cpu_computes(whole: Machine, tmp_path: Path):
    def need(machine: Machine, override: str = "distribution.kind=auto") -> float:
        return host_memory(tiny_config(tmp_path, override), machine)

    assert need(whole) < need(dataclasses.replace(whole, driver=None)) == need(whole, "distribution.kind=cpu")
    assert need(whole) == need(whole, "distribution.kind=gpu") < need(whole, "distribution.logical_devices=2")


def test_conda_s_own_tensorflow_finds_what_its_environment_has_and_that_of_pip_needs_the_path(whole: Machine):
    prefix = whole.root / "env"
    for _, files in WHEELS.values():
        for file in files:
            touch(prefix / "lib" / file)
    for file in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc", "conda-meta/cuda-nvcc-12.9.json"):
        touch(prefix / file)
    machine = dataclasses.replace(whole, site=prefix / "lib/python3.12/site-packages")
    found = faults(check_libraries(machine))
    assert len(found) == 9 and all(f"export LD_LIBRARY_PATH={prefix}/lib$" in each.repair for each in found)
    touch(prefix / "conda-meta/tensorflow-base-2.21.0-cuda126.json")
    assert not faults(check_libraries(machine))


def test_xla_finds_its_assembler_on_the_path_and_its_functions_by_its_flag(whole: Machine):
    tools = whole.root / "tools"
    touch(tools / "bin/ptxas")
    (tools / "bin/ptxas").chmod(0o755)
    touch(tools / "nvvm/libdevice/libdevice.10.bc")
    shutil.rmtree(whole.site / "nvidia/cuda_nvcc")
    environ = {"PATH": f"/nowhere:{tools}/bin"}
    (found,) = faults(check_libraries(dataclasses.replace(whole, environ=environ)))
    assert found.what.startswith("nvvm/libdevice/libdevice.10.bc, the library of functions")
    environ = {"XLA_FLAGS": f"--xla_dump_to=/x --xla_gpu_cuda_data_dir={tools}"}
    assert not faults(check_libraries(dataclasses.replace(whole, environ=environ)))


def test_files_of_the_system_are_read_whatever_their_encoding(whole: Machine, tmp_path: Path):
    text = tmp_path / "latin"
    text.write_bytes(b"flags : amx_bf16\n# caf\xe9\n/opt/cuda/lib\n")
    touch(whole.root / "etc/ld.so.conf.d/empty.conf")
    shutil.copy(text, whole.root / "etc/ld.so.conf.d/latin.conf")
    assert whole.root / "opt/cuda/lib" in list(system_folders(whole.root))
    assert read_line(text).endswith("lib") and describe_cpu(text).endswith("AMX") and multiplies_bfloat16(text)


def test_a_driver_for_a_cuda_without_a_known_one_is_the_newest(whole: Machine):
    newer = dataclasses.replace(whole, build=Build("2.23.0", (14, 0), ((9, 0),)))
    (found,) = check_driver(newer)
    assert found.repair.startswith("Install the newest driver (on Ubuntu: ")


def test_a_prepared_text_needs_no_room_and_nobody_writes_beside_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    data = {"train": str(tmp_path / "a.txt"), "documents": "file", "held_out_fraction": 0.1}
    config = tiny_config(tmp_path, data=data, tokenizer={"kind": "char"})
    prepared = tiny_prepared(config)
    found = [each for each in check_folders(config) if each.check == "data.prepared_folder"]
    assert found == [Finding("ok", "data.prepared_folder", f"{prepared.folder}: the text is prepared already")]
    (prepared.folder / "manifest.json").write_text("{")
    (again,) = [each for each in check_folders(config) if each.check == "data.prepared_folder"]
    assert "written at" in again.what


def test_a_text_that_cannot_be_found_or_read_is_left_to_its_reader(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("four")
    need = need_of_text(tiny_config(tmp_path, data={"train": ["~no-such-user/x", f"{file}/b", str(file)]}))
    assert need.room_bytes == 8


def test_both_folders_of_a_run_are_checked(tmp_path: Path):
    found = list(check_folders(tiny_config(tmp_path)))
    assert [(each.check, each.level) for each in found] == [("run_folder", "ok"), ("data.prepared_folder", "ok")]


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path):
    touch(tmp_path / "file")
    for folder, reason in ((tmp_path / "file" / "runs", "Not a directory"), (Path("/proc/runs"), "")):
        (found,) = check_writing(folder, Need("run_folder"))
        assert found.level == "error" and found.what.startswith(f"{folder} cannot be written: {reason}")
        assert found.repair.endswith("or choose another run_folder")
    assert not (tmp_path / "runs").exists()
    (found,) = check_writing(tmp_path / "runs", Need("run_folder"))
    assert found.level == "ok" and re.search(r"runs: [\d.]+ [MG]B free, written at [\d.]+ [MG]B/s", found.what)
    assert not (tmp_path / "runs").exists() and sorted(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_or_too_small_is_named_with_what_it_lacks(small_disk: Path):
    need = Need("run_folder", 6e6, 2e6, "3 checkpoints of 2.0 MB", "set a smaller checkpoint.keep_last")
    (found,) = check_space(small_disk, need)
    assert found.level == "error"
    assert found.what.endswith("/disk has 1.0 MB free, and the run needs 6.0 MB there: 3 checkpoints of 2.0 MB")
    assert found.repair == "Make room, set a smaller checkpoint.keep_last, or choose another run_folder"
    (found,) = check_space(small_disk, need._replace(least_bytes=5e5))
    assert found.level == "warning"
    assert not list(check_space(small_disk, need._replace(room_bytes=1e6)))
    (found,) = check_writing(small_disk / "runs", need)
    assert found.level == "error" and found.repair == "Make room, or choose another run_folder"
    assert "cannot be written: No space left on device" in found.what
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(("skew", "direction"), [(600.0, "600 s behind"), (-600.0, "600 s ahead of")])
def test_a_clock_that_differs_is_named(skew: float, direction: str, tmp_path: Path):
    found = faults(check_writing(tmp_path, Need("run_folder"), now=lambda: time.time() + skew))
    assert [each.check for each in found] == ["clock"]
    assert direction in found[0].what and "timedatectl set-ntp true" in found[0].repair


def test_a_disk_that_takes_long_to_write_has_no_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed: list[int] = []

    def slow_at_first(file: int) -> None:  # The file was written long before all of it is on the disk.
        if not flushed:
            os.utime(file, (time.time() - 20, time.time() - 20))
        flushed.append(file)

    monkeypatch.setattr(os, "fsync", slow_at_first)
    assert not faults(check_writing(tmp_path, Need("run_folder")))


def test_limits_that_are_too_low_are_named(whole: Machine):
    (found,) = check_open_files((64, 1_000_000))
    assert "only 64 files" in found.what and found.repair.endswith("ulimit -n 4096")
    assert not list(check_open_files((128, 128)))
    (found,) = check_shared_memory(8, 64 << 20)
    assert "/dev/shm has 67.1 MB" in found.what and "docker run --shm-size=1g" in found.repair
    assert not list(check_shared_memory(1, 64 << 20)) and not list(check_shared_memory(8, 1 << 30))
    # Version 1 of cgroups, in a container that does not see the group by its own name.
    touch(whole.root / "proc/self/cgroup", "3:cpuset:/\n4:memory:/docker/abc\n0::/\n")
    touch(whole.root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "512000000\n")
    assert memory_limit(whole.root) == (512_000_000, "the cgroup /docker/abc")
    assert not faults(check_memory(4e8, whole.root)) and faults(check_memory(6e8, whole.root))


def test_a_python_that_trainer_does_not_run_on_is_named():
    (found,) = check_python({"gpt-trainer": Package("0.1.0", python=">=3.11,<3.14")}, "3.10.4")
    assert found.level == "error" and found.what == "This is Python 3.10.4, and only >=3.11,<3.14 is supported"


def test_training_makes_the_quick_checks_with_the_words_of_the_doctor(whole: Machine, tmp_path: Path):
    unknown = Driver(0, (13, 0), (RTX_5090,))
    for breakage in (change(driver=unknown), install(keras="3.12.0"), install(tf_nightly="2.22.0")):
        broken = breakage(whole)
        config = tiny_config(tmp_path)
        assert faults(quick_checks(config, broken)) == faults(examine(config, broken)) != []
    assert not faults(quick_checks(tiny_config(tmp_path), whole))
    # TensorFlow leaves such a GPU out, and the run goes on without it.
    too_old = dataclasses.replace(whole, driver=Driver(0, (12, 5), (GTX_980,)))
    assert not faults(quick_checks(tiny_config(tmp_path), too_old))
    # So it does with all GPUs if a library is missing.
    (whole.site / "nvidia/cublas/lib/libcublas.so.12").unlink()
    without = dataclasses.replace(whole, build=TF_2_20, driver=unknown)
    assert not faults(quick_checks(tiny_config(tmp_path), without))
    # What does not concern the run is not looked at.
    broken = dataclasses.replace(whole, driver=unknown)
    for override in ("distribution.kind=cpu", "distribution.logical_devices=2"):
        assert not faults(quick_checks(tiny_config(tmp_path, override), broken))


def test_only_a_worker_that_saves_needs_room(whole: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1 << 40, free=0))
    (found,) = faults(quick_checks(tiny_config(tmp_path), whole))
    assert (found.level, found.check) == ("error", "run_folder")
    assert not faults(quick_checks(tiny_config(tmp_path), whole, saves=False))


def test_training_refuses_what_would_fail_and_warns_of_the_rest(
    whole: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    for driver, overrides, refused in (
        (Driver(0, (13, 0), (RTX_5090,)), (), False),
        (Driver(0, (13, 0), (RTX_5090,)), ("train.xla=on",), True),
    ):
        machine = dataclasses.replace(whole, driver=driver)
        monkeypatch.setattr("trainer.training.checks.this_machine", lambda packages, machine=machine: machine)
        if refused:
            with pytest.raises(UserError, match=r"train\.xla='on', but .*\. Set train\.xla=off"):
                check_start(tiny_config(tmp_path, *overrides), said.append)
        else:
            check_start(tiny_config(tmp_path, *overrides), said.append)
    (line,) = said
    assert line.startswith(
        "warning: TensorFlow 2.21.0, built with CUDA 12.5, has no machine code for NVIDIA GeForce RTX 5090"
    )


def test_the_command_prints_each_fault_with_its_repair_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "check_devices", lambda distribution: iter(()))
    monkeypatch.setenv("TF_CONFIG", "{")
    assert main(["doctor", "run_folder=/proc/runs"]) == ExitStatus.FAILED
    lines = capsys.readouterr().out.splitlines()
    for check, what, repair in (
        ("workers", "TF_CONFIG='{' is not what it should be, JSON", "Set it on every worker"),
        ("run_folder", "/proc/runs cannot be written", "Check the path and its file system, or choose another"),
    ):
        (number,) = [number for number, line in enumerate(lines) if line.startswith(f"error    {check:<20} {what}")]
        assert lines[number + 1].split(maxsplit=1) == ["repair:", lines[number + 1].partition("repair:")[2].strip()]
        assert repair in lines[number + 1]
    assert lines[-1] == "2 errors, no warnings."
    assert main(["doctor", "--json", "run_folder=/proc/runs"]) == ExitStatus.FAILED
    found = json.loads(capsys.readouterr().out)
    assert {"level", "check", "what", "repair"} == set(found[0])
    assert [each["check"] for each in found if each["level"] == "error"] == ["workers", "run_folder"]


def test_a_computation_that_fails_is_reported_with_what_to_try(monkeypatch: pytest.MonkeyPatch):
    def found(outcome: object) -> Finding:
        def call(*_: object) -> object:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(doctor, "call_in_new_process", call)
        (one,) = doctor.check_devices(tiny_config())
        return one

    assert found(("GPU", 4, True, 67_108_864, 0.001)).what == "4 x GPU add up 67.1 MB at 67.11 GB/s"
    wrong = found(("GPU", 4, False, 67_108_864, 0.001))
    assert wrong.level == "error" and wrong.what == "4 x GPU computed a wrong product or sum"
    killed = found(UserError("The process of _compute was killed by SIGABRT. If this machine was short of memory, ..."))
    assert killed.level == "error" and "killed by SIGABRT" in killed.what and "distribution.kind=cpu" in killed.repair
    endless = found(UserError("The process of _compute was killed by SIGALRM."))
    assert "had no end" in endless.what and "NCCL_DEBUG=INFO" in endless.repair


def test_a_split_over_one_device_is_found(monkeypatch: pytest.MonkeyPatch):
    split = tiny_config(distribution={"shard": "optimizer"})

    def found(config: Config, num_devices: int) -> list[Finding]:
        monkeypatch.setattr(doctor, "call_in_new_process", lambda *_: ("GPU", num_devices, True, 67_108_864, 0.001))
        _, *others = doctor.check_devices(config)
        return others

    (one,) = found(split, 1)
    assert (one.level, one.check) == ("error", "distribution.shard")
    assert one.what == "distribution.shard='optimizer' splits over several replicas, and there is only one"
    assert one.repair == "Choose 'nothing', or train on more devices"
    assert not found(split, 2) and not found(tiny_config(), 1)
    workers = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    assert not found(split, 1)


@pytest.mark.slow
def test_the_whole_command_finds_this_machine_well(tmp_path: Path):
    command = [sys.executable, "-m", "trainer", "doctor", "quickstart", "distribution.logical_devices=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "All is well." and all(line.startswith("ok ") for line in lines[:-1])
    assert re.fullmatch(r"ok       devices              2 x CPU add up 67\.1 MB at [\d.]+ [MG]B/s", lines[-2])
    assert not list(tmp_path.iterdir())
