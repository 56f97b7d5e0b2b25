"""Laws of the choice of devices."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tensorflow as tf

from trainer.config.file import load_config, make_config
from trainer.config.settings import DistributionConfig
from trainer.distributed import strategy as distribution
from trainer.distributed.strategy import (
    describe_devices,
    device_kind,
    distributed,
    find_devices,
    gpu_numbers,
    make_strategy,
    refuse_gpus_without_code,
    share_cores,
    use_one_inter_op_thread,
    visible_gpus,
)
from trainer.distributed.workers import Workers
from trainer.errors import UserError
from trainer.hardware.cuda import Gpu, installed_build, make_build
from trainer.hardware.devices import parse_target
from trainer.system.machine import describe_cpu

NUM_GPUS = len(tf.config.list_physical_devices("GPU"))
HAS_GPU = NUM_GPUS > 0


@pytest.mark.parametrize("kind", ["auto", "cpu"])
def test_one_device_is_chosen_and_holds_the_variables(kind):
    strategy = make_strategy(DistributionConfig(kind=kind))
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert strategy.num_replicas_in_sync == 1
    expected = "GPU:0" if HAS_GPU and kind == "auto" else "CPU:0"
    assert variable.device.endswith(expected)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"distribution\.kind='gpu', but TensorFlow sees no GPU\. This machine"):
        make_strategy(DistributionConfig(kind="gpu"))
    with pytest.raises(UserError, match=r"distribution\.gpus=\[1, 0\], but TensorFlow sees no GPU\. This machine"):
        make_strategy(DistributionConfig(gpus=(1, 0)))
    # The message goes on with this, whether the config names GPUs or not.
    with pytest.raises(UserError) as error:
        make_strategy(load_config("gpt2_124m_8gpu").distribution)
    advice = str(error.value).partition("To train on the CPU: ")[2].split()
    for name in ("gpt2_124m_8gpu", "quickstart"):
        assert device_kind(make_strategy(load_config(name, advice).distribution)) == "CPU"


def test_the_gpus_named_are_used_and_one_that_is_not_seen_is_an_error():
    assert gpu_numbers(None, 3) == [0, 1, 2]
    assert gpu_numbers((2, 0), 3) == [0, 2]
    assert gpu_numbers((0,), 1) == [0]
    with pytest.raises(UserError, match=r"distribution\.gpus=\[0, 2\], but TensorFlow sees 2, numbered from 0; choose"):
        gpu_numbers((0, 2), 2)


@pytest.mark.skipif(not HAS_GPU, reason="this machine has no GPU")
def test_a_run_sees_no_gpu_but_those_named():
    # In a new process: hidden GPUs stay hidden in a process.
    program = """
        import tensorflow as tf
        from trainer.config.settings import DistributionConfig
        from trainer.distributed.strategy import make_strategy
        *_, last = tf.config.list_physical_devices("GPU")
        strategy = make_strategy(DistributionConfig(gpus=(int(last.name.rpartition(":")[2]),)))
        assert tf.config.get_visible_devices("GPU") == [last]
        assert [device.name for device in tf.config.list_logical_devices("GPU")] == ["/device:GPU:0"]
        with strategy.scope():
            assert tf.Variable(1.0).device.endswith("GPU:0")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_run_prints_its_devices_and_warns_of_a_gpu_that_it_does_not_use(monkeypatch):
    warning = "This machine's NVIDIA GPU is not used: ..."
    monkeypatch.setattr(distribution, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(distribution, "unused_gpu", lambda machine: warning)
    strategy = make_strategy(DistributionConfig())
    devices = f"Devices: {describe_cpu()}"
    assert describe_devices(strategy, DistributionConfig(), Workers()) == [devices, f"warning: {warning}"]
    # There is no warning if the config asks for the CPU.
    for config in (DistributionConfig(kind="cpu"), DistributionConfig(logical_devices=2)):
        assert describe_devices(strategy, config, Workers()) == [devices]
    of_several = describe_devices(strategy, DistributionConfig(kind="cpu"), Workers(("a:1", "b:1"), 1))
    assert of_several == [f"Devices: 2 workers; worker 1: {describe_cpu()}"]


def test_the_installed_build_is_read_without_loading_it_as_tensorflow_tells_it():
    assert installed_build() == make_build(tf.__version__, tf.sysconfig.get_build_info())
    assert installed_build(Path("nowhere")) is None


def test_a_build_whose_record_is_cut_off_is_none(tmp_path):
    record = tmp_path / "python/platform/build_info.py"
    record.parent.mkdir(parents=True)
    for text in ("build_info = {'is_cuda_build': (", "", "raise SystemError"):
        record.write_text(text)
        assert installed_build(tmp_path) is None


def test_a_gpu_on_which_this_tensorflow_fails_is_refused_before_it_is_used():
    wheel = {"is_cuda_build": True, "cuda_version": "12.5.1", "cuda_compute_capabilities": ["sm_89", "compute_90"]}
    new, known = Gpu("NVIDIA GeForce RTX 5090", (12, 0)), Gpu("NVIDIA L4", (8, 9))
    with pytest.raises(UserError, match=r"has no machine code for NVIDIA GeForce RTX 5090 .*Install 2\.21"):
        refuse_gpus_without_code((known, new), make_build("2.20.0", wheel))
    refuse_gpus_without_code((known, new), make_build("2.21.0", wheel))  # There it runs without XLA.
    refuse_gpus_without_code((known,), make_build("2.20.0", wheel))
    refuse_gpus_without_code(visible_gpus())


@pytest.mark.parametrize(
    ("settings", "num_workers", "threads"),
    [
        ({}, 1, 3),  # Two halves at once.
        ({"train.global_batch_size": 8}, 1, None),  # Too small for halves,
        ({"train.global_batch_size": 8, "train.micro_batch_size": 2}, 1, 3),  # unless one asks for parts,
        ({"train.global_batch_size": 8, "distribution.logical_devices": 2}, 1, 3),  # or replicas are these,
        ({"train.global_batch_size": 8}, 2, 3),  # as they are elsewhere.
        ({"train.micro_batch_size": 64}, 1, None),
        ({"train.xla": "on"}, 1, None),
        ({"distribution.kind": "tpu"}, 1, None),
    ],
)
def test_two_parts_at_once_share_the_cores_of_a_cpu(settings, num_workers, threads, monkeypatch):
    asked = []
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(distribution, "num_cores", lambda: 7)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", asked.append)
    train = {"precision": "float32", "total_steps": 1, "global_batch_size": 64, "sequence_length": 64}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = make_config({"run_folder": "unused", "train": train}, overrides)
    share_cores(config, Workers(("a:1", "b:1")[:num_workers]))
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "5")
    share_cores(config, Workers(("a:1", "b:1")[:num_workers]))
    assert asked == ([] if threads is None else [threads])


@pytest.mark.parametrize(("gpus", "threads"), [([], [1]), (["GPU:0"], [])])
def test_a_process_that_only_writes_on_a_cpu_runs_one_operation_at_a_time(gpus, threads, monkeypatch):
    asked = []
    monkeypatch.delenv("TF_NUM_INTEROP_THREADS", raising=False)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config.threading, "set_inter_op_parallelism_threads", asked.append)
    use_one_inter_op_thread()
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "2")
    use_one_inter_op_thread()
    assert asked == threads


def test_a_process_that_has_used_tensorflow_keeps_its_threads():
    program = """
        import tensorflow as tf
        from trainer.config.file import make_config
        from trainer.distributed.strategy import make_strategy, share_cores, use_one_inter_op_thread
        from trainer.distributed.workers import Workers
        config = make_config({
            "run_folder": "unused",
            "train": {"precision": "float32", "total_steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
            "distribution": {"kind": "cpu"},
        })
        make_strategy(config.distribution)
        before = tf.config.threading.get_intra_op_parallelism_threads()
        share_cores(config, Workers())
        assert tf.config.threading.get_intra_op_parallelism_threads() == before
        before = tf.config.threading.get_inter_op_parallelism_threads()
        use_one_inter_op_thread()
        assert tf.config.threading.get_inter_op_parallelism_threads() == before
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_iterator_of_batches_on_a_cpu_has_no_thread_to_wait_for_at_its_end():
    batches = tf.data.Dataset.range(3)
    assert batches.options().autotune.enabled is None  # On.
    strategy = make_strategy(DistributionConfig(kind="cpu"))
    assert distributed(strategy, lambda share: batches).options().autotune.enabled is False


def test_one_worker_can_compute_without_the_others(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}')
    for kind in ("auto", "multi_worker"):
        assert make_strategy(DistributionConfig(kind=kind), ignore_workers=True).num_replicas_in_sync == max(
            1, NUM_GPUS
        )


def test_devices_are_found_in_the_table_by_what_they_are_called():
    assert find_devices("GPU", ["NVIDIA H100 80GB HBM3"], 16) == parse_target("gpu:H100x16")
    # The accelerator type counts all hosts' cores.
    assert find_devices("TPU", ["v5litepod-8"], 8) == parse_target("tpu:v5e-8")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("CPU", []),
        ("GPU", []),
        ("GPU", ["NVIDIA Z9"]),
        ("GPU", ["NVIDIA L4", "Tesla T4"]),
        ("TPU", ["v9-8"]),
        ("TPU", []),
    ],
)
def test_devices_that_are_not_in_the_table_or_not_alike_have_no_peak(kind: str, names: list[str]):
    assert find_devices(kind, names, 1) is None
