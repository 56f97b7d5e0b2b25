"""Laws of what a build of TensorFlow has for an NVIDIA GPU, and of what is asked of the driver."""

import os
import shutil
import subprocess

import pytest

from trainer.hardware.cuda import Build, Driver, Gpu, Support, make_build, read_driver, support_of

WHEEL = {
    "is_cuda_build": True,
    "cuda_version": "12.5.1",
    "cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"],
}
TF_2_20, TF_2_21 = make_build("2.20.0", WHEEL), make_build("2.21.0", WHEEL)
# As TensorFlow's users build it for Blackwell.
FOR_120 = make_build(
    "2.20.0", WHEEL | {"cuda_version": "12.8.0", "cuda_compute_capabilities": ["sm_89", "sm_120a", "compute_120"]}
)
NATIVE, BY_THE_DRIVER = Support(True, True, True), Support(True, False, True)
WITHOUT_XLA, NOTHING = Support(True, False, False), Support(False, False, False)


def test_a_build_s_record_is_read_as_versions():
    assert Build("2.21.0", (12, 5), ((6, 0), (7, 0), (8, 0), (8, 9)), ((9, 0),)) == TF_2_21
    assert FOR_120.binaries == ((8, 9), (12, 0)) and FOR_120.ptx == ((12, 0),)
    assert make_build("2.21.0", {"is_cuda_build": False}) == Build("2.21.0")


@pytest.mark.parametrize(
    ("build", "capability", "support"),
    [
        (TF_2_21, (5, 2), NOTHING),  # GTX 980
        (TF_2_21, (6, 1), NATIVE),  # machine code for 6.0 runs on 6.1
        (TF_2_21, (8, 6), NATIVE),
        (TF_2_21, (8, 9), NATIVE),
        (TF_2_21, (9, 0), BY_THE_DRIVER),  # H100
        (TF_2_20, (9, 0), BY_THE_DRIVER),
        (TF_2_21, (10, 0), WITHOUT_XLA),  # B200
        (TF_2_21, (10, 3), WITHOUT_XLA),
        (TF_2_21, (12, 0), WITHOUT_XLA),  # RTX 5090
        (TF_2_21, (12, 1), WITHOUT_XLA),
        (TF_2_20, (10, 0), NOTHING),
        (TF_2_20, (12, 0), NOTHING),
        (FOR_120, (12, 0), NATIVE),
        (FOR_120, (12, 1), Support(True, True, False)),  # CUDA 12.8 does not name 12.1.
        (FOR_120, (9, 0), NOTHING),
        (FOR_120, (10, 0), NOTHING),
        (TF_2_21, (13, 0), WITHOUT_XLA),  # A GPU of the future.
        (TF_2_21._replace(cuda=(13, 0), ptx=((12, 0),)), (13, 0), WITHOUT_XLA),
        (TF_2_21._replace(cuda=(13, 0), ptx=((12, 0),)), (12, 1), BY_THE_DRIVER),
        (Build("2.21.0"), (8, 0), NOTHING),
    ],
)
def test_what_runs_on_a_gpu_follows_from_the_build_and_the_capability(build, capability, support):
    assert support_of(build, capability) == support


STUB = """
#include <string.h>
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { return ERROR; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strcpy(name, device ? "NVIDIA GeForce RTX 5090" : "NVIDIA H100 80GB HBM3"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device ? 12 : 9) : 0; return attribute == 75 || attribute == 76 ? 0 : 1; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to build a stand-in for the driver")
def test_the_driver_tells_its_gpus_or_why_it_does_not_start(tmp_path):
    (tmp_path / "stub.c").write_text(STUB)
    for error in (0, 803):
        command = ["cc", "-shared", "-fPIC", f"-DERROR={error}", "stub.c", "-o", f"lib{error}.so"]
        subprocess.run(command, cwd=tmp_path, check=True)
    gpus = (Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA GeForce RTX 5090", (12, 0)))
    assert read_driver(os.fspath(tmp_path / "lib0.so")) == Driver(0, (12, 8), gpus)
    assert read_driver(os.fspath(tmp_path / "lib803.so")) == Driver(803, (12, 8), ())
    assert read_driver("libcuda-of-nobody.so.1") is None
