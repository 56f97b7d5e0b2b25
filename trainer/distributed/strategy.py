"""Chooses the devices of a run. Only this module makes a strategy of tf.distribute."""

import contextlib
import os
import threading
import urllib.request
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from pathlib import Path

import tensorflow as tf

from trainer.config.settings import Config, DistributionConfig
from trainer.data.batches import WHOLE_BATCH, Share
from trainer.distributed.tpu_install import check_tpu_install
from trainer.distributed.workers import Workers, find_workers
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.checks import Machine, check_support, this_machine
from trainer.hardware.cuda import Build, Driver, Gpu, make_build, support_of
from trainer.hardware.devices import Target, find_gpu, parse_target
from trainer.hardware.processor import Processor, processor
from trainer.hardware.unused import unused_gpu, unused_tpu
from trainer.system.machine import describe_cpu, has_nvidia_gpu, num_cores

TPU_TIMEOUT_SECS = 50.0

# A TPU VM can read here which TPU it has.
TPU_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type"


def share_cores(config: Config, workers: Workers) -> None:
    """Gives each operation half of a CPU's cores if two micro-batches are computed at a time: two operations that each
    use all cores slow each other down.

    Call it before TensorFlow computes anything; later it has no effect. It has none either if TF_NUM_INTRAOP_THREADS is
    set. Whether the cores are shared depends on the run's config, and not on how its micro-batches are spread over
    replicas: another number of threads can change the last bits of a product.

    Args:
        config: the run's configuration.
        workers: the workers of the run.

    Raises:
        UserError: the batch cannot be spread evenly over the replicas.
    """
    distribution = config.distribution
    if distribution.kind == "tpu" or _wants_gpus(distribution):
        return
    num_replicas = len(workers.addresses) if workers.are_several else distribution.logical_devices
    execution = resolve(config, processor("CPU"), num_replicas)
    # XLA compiles a step as one operation. A worker's only replica may compute one micro-batch at a time.
    is_alone = execution.total_micro_batches == 1 or (workers.are_several and execution.at_once == 1)
    if execution.ops == "xla" or is_alone or "TF_NUM_INTRAOP_THREADS" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # This process has used TensorFlow already.
        tf.config.threading.set_intra_op_parallelism_threads(max(1, num_cores() // 2))


def use_one_inter_op_thread() -> None:
    """Lets TensorFlow run one operation at a time, each on all cores, for a process that only writes text on a CPU.

    A token's operations depend on each other, so that further threads find nothing to do: they only pass the work on.
    Call it before TensorFlow computes anything; later it has no effect. It has none either if TF_NUM_INTEROP_THREADS is
    set, or if there is a GPU.
    """
    if "TF_NUM_INTEROP_THREADS" in os.environ or tf.config.list_physical_devices("GPU"):
        return
    with contextlib.suppress(RuntimeError):  # This process has used TensorFlow already.
        tf.config.threading.set_inter_op_parallelism_threads(1)


def make_strategy(config: DistributionConfig, ignore_workers: bool = False) -> tf.distribute.Strategy:
    """Returns the strategy under which the model is built and the step is run.

    Call it before TensorFlow computes anything: after that, TensorFlow can neither split the CPU nor join workers.

    Args:
        config: the devices to use.
        ignore_workers: whether to use only this process, even if TF_CONFIG names several workers.

    Raises:
        UserError: the config names devices that are not there.
    """
    if not ignore_workers and find_workers(config).are_several:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if config.kind == "tpu":
        return _tpu(config)
    return _gpus(config.gpus) if _wants_gpus(config) else _cpu(config.logical_devices)


def first_device(strategy: tf.distribute.Strategy) -> tf.distribute.Strategy:
    """Returns the first device of this process's replicas, as a strategy of its own."""
    return tf.distribute.OneDeviceStrategy(strategy.extended.worker_devices[0])


def count_replicas_of(workers: Workers) -> int:
    """Returns how many replicas `make_strategy` will make for several workers with equal devices, before it does."""
    return len(workers.addresses) * max(1, _num_gpus())


def devices_of_this_worker() -> str:
    """Returns the devices that `make_strategy` will use on this worker. Several workers need the same devices."""
    return f"{_num_gpus()} x GPU" if _num_gpus() else "the CPU"


def distributed(
    strategy: tf.distribute.Strategy, batches_of: Callable[[Share], tf.data.Dataset]
) -> Iterable[tuple[tf.Tensor, ...]]:
    """Returns batches for `strategy.run`: every worker makes its share, and every replica gets a share of it.

    Args:
        strategy: the run's strategy.
        batches_of: returns the pipeline of a worker's share.
    """
    is_cpu = device_kind(strategy) == "CPU"
    if strategy.num_replicas_in_sync == 1 and is_cpu:
        # The batches are already where they are needed. A distributed dataset would pass each batch through two more
        # threads.
        return _without_autotuning(batches_of(WHOLE_BATCH))

    def batches_of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        per_worker = context.num_replicas_in_sync // context.num_input_pipelines
        share = Share(context.input_pipeline_id * per_worker, per_worker, context.num_replicas_in_sync)
        return _without_autotuning(batches_of(share)) if is_cpu else batches_of(share)

    # On CPUs there is nowhere to fetch batches to, and each fetching iterator would autotune itself.
    options = tf.distribute.InputOptions(experimental_fetch_to_device=not is_cpu)
    batches: Iterable[tuple[tf.Tensor, ...]] = strategy.distribute_datasets_from_function(batches_of_worker, options)
    return batches


def _without_autotuning(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Turns tf.data's autotuning off, whose thread sleeps longer and longer, up to a minute. An iterator waits for that
    thread when it is destroyed, and a wake-up is lost if it comes between two of the thread's checks: every third run
    ended with such a wait.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """Returns "CPU", "GPU" or "TPU"."""
    return str(tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type)


def processor_of(strategy: tf.distribute.Strategy) -> Processor:
    """Returns the kind of device that the replicas of a strategy are on."""
    found = processor(device_kind(strategy))
    if found.kind != "GPU":
        return found
    # The devices are open, and XLA has not compiled for them yet: only then would it end the process.
    gpus = visible_gpus()
    return found._replace(compiles=all(support_of(_build(), gpu.capability).compiles for gpu in gpus))


def visible_gpus() -> tuple[Gpu, ...]:
    """Returns the NVIDIA GPUs that TensorFlow may use."""
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    return tuple(
        Gpu(each.get("device_name", "a GPU"), each["compute_capability"])
        for each in details
        if "compute_capability" in each
    )


def refuse_gpus_without_code(gpus: tuple[Gpu, ...], build: Build | None = None) -> None:
    """Refuses GPUs on which the operations of this build of TensorFlow fail.

    Args:
        gpus: the GPUs to use.
        build: the build; None: the installed one.

    Raises:
        UserError: there is such a GPU; the message is that of `trainer doctor`.
    """
    machine = Machine({}, build or _build(), Path(), Driver(gpus=gpus))
    for finding in check_support(machine, xla="off"):
        if finding.level == "error":
            raise UserError(str(finding))


def _build() -> Build:
    return make_build(tf.__version__, tf.sysconfig.get_build_info())


def device_names(strategy: tf.distribute.Strategy) -> set[str]:
    """Returns the names of this worker's devices: the driver's names of GPUs, or the accelerator type of a TPU, such as
    v5litepod-8. Empty if the devices have no known name, as on a CPU.
    """
    kind = device_kind(strategy)
    if kind == "GPU":
        details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
        return {each["device_name"] for each in details if "device_name" in each}
    if kind == "TPU":
        accelerator_type = os.environ.get("TPU_ACCELERATOR_TYPE") or _tpu_type_of_this_machine()
        return {accelerator_type} if accelerator_type else set()
    return set()


def describe_devices(strategy: tf.distribute.Strategy, config: DistributionConfig, workers: Workers) -> list[str]:
    """Returns a line that names the devices of a run, such as 2 CPU cores with AMX, or 2 x RTX 4090; and a warning if
    the machine has a GPU or a TPU that the config would use and that TensorFlow does not see.

    Args:
        strategy: the run's strategy.
        config: the section `distribution` of the run's config.
        workers: the workers of the run; if there are several, the line names this one.
    """
    num_replicas = strategy.num_replicas_in_sync // len(workers.addresses)
    kind = device_kind(strategy)
    names = [name.removeprefix("NVIDIA ").removeprefix("GeForce ") for name in sorted(device_names(strategy))]
    if kind == "CPU":
        devices = describe_cpu() + (f", split into {num_replicas} replicas" if num_replicas > 1 else "")
    elif kind == "TPU":
        devices = " ".join(["TPU", *names]) + f", {num_replicas} replicas"
    else:
        devices = f"{num_replicas} x {' and '.join(names) or kind}"
    if workers.are_several:
        devices = f"{len(workers.addresses)} workers; worker {workers.number}: {devices}"
    wants_more = config.kind in ("auto", "multi_worker") and config.logical_devices == 1
    warnings = (unseen_gpu(), unused_tpu()) if wants_more else ()
    return [f"Devices: {devices}", *(f"warning: {warning}" for warning in warnings if warning)]


def unseen_gpu() -> str | None:
    """Returns why TensorFlow does not see this machine's GPU, and what to do; None if it sees one or none exists."""
    # Without this look every start on a CPU would read the metadata of all packages.
    return unused_gpu(this_machine()) if has_nvidia_gpu() and not _num_gpus() else None


def find_devices(kind: str, names: Collection[str], num_replicas: int) -> Target | None:
    """Returns the entry of the device table for the devices of a run; None if the table has none.

    Args:
        kind: what `device_kind` returned.
        names: what `device_names` returned; devices of several kinds have no entry.
        num_replicas: the replicas of the run. A TPU's accelerator type includes their number.
    """
    if kind == "CPU" or len(names) != 1:
        return None
    (name,) = names
    if kind == "TPU":
        try:
            return parse_target(f"tpu:{name}")
        except UserError:
            return None
    gpu = find_gpu(name)
    return None if gpu is None else Target(gpu, num_replicas)


def _wants_gpus(config: DistributionConfig) -> bool:
    wants_cpu = config.kind == "cpu" or config.logical_devices > 1
    return config.kind == "gpu" or config.gpus is not None or (_num_gpus() > 0 and not wants_cpu)


def _num_gpus() -> int:
    return len(tf.config.list_physical_devices("GPU"))


def _gpus(chosen: tuple[int, ...] | None) -> tf.distribute.Strategy:
    seen = tf.config.list_physical_devices("GPU")
    numbers = gpu_numbers(chosen, len(seen))
    used = [seen[number] for number in numbers]
    try:
        # Hide the other GPUs: TensorFlow would take their memory, too, which another run may need.
        if tf.config.get_visible_devices("GPU") != used:
            tf.config.set_visible_devices(used, "GPU")
    except RuntimeError:
        raise UserError(
            f"distribution.gpus={numbers}: this process has used TensorFlow already, and GPUs can only be chosen "
            "before. Start a new process."
        ) from None
    refuse_gpus_without_code(visible_gpus())
    # TensorFlow numbers the visible GPUs from 0.
    devices = [f"/gpu:{i}" for i in range(len(used))]
    return tf.distribute.OneDeviceStrategy(devices[0]) if len(used) == 1 else tf.distribute.MirroredStrategy(devices)


_NO_GPU = "This machine shows no NVIDIA GPU."


def gpu_numbers(chosen: tuple[int, ...] | None, num_seen: int) -> list[int]:
    """Returns the numbers of the GPUs to use, in rising order.

    Args:
        chosen: the setting distribution.gpus; None: all GPUs.
        num_seen: the number of GPUs that TensorFlow sees.

    Raises:
        UserError: it sees none, or fewer than the setting names.
    """
    setting = "distribution.kind='gpu'" if chosen is None else f"distribution.gpus={list(chosen)}"
    if not num_seen:
        raise UserError(
            f"{setting}, but TensorFlow sees no GPU. {unused_gpu(this_machine()) or _NO_GPU}\n"
            "To train on the CPU: distribution.kind=cpu distribution.gpus=none"
        )
    if chosen is not None and max(chosen) >= num_seen:
        raise UserError(
            f"{setting}, but TensorFlow sees {num_seen}, numbered from 0; choose among these, or leave it out for all."
        )
    return sorted(chosen or range(num_seen))


def _tpu(config: DistributionConfig) -> tf.distribute.Strategy:
    name = config.tpu_name
    check_tpu_install()

    def connect() -> tf.distribute.cluster_resolver.TPUClusterResolver:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            name, zone=config.tpu_zone, project=config.tpu_project
        )
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return resolver

    # In a thread: the search for a TPU that does not exist can take many minutes. A daemon, so that it delays no exit.
    connected: Future[tf.distribute.cluster_resolver.TPUClusterResolver] = Future()

    def try_to_connect() -> None:
        try:
            connected.set_result(connect())
        except Exception as error:
            connected.set_exception(error)

    threading.Thread(target=try_to_connect, name="tpu", daemon=True).start()
    try:
        resolver = connected.result(timeout=TPU_TIMEOUT_SECS)
    except Exception as error:
        reason = f"no answer within {TPU_TIMEOUT_SECS:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise UserError(
            f"distribution.tpu_name={name!r}: no TPU could be reached ({reason[:300]}). Use 'local' for the TPU "
            "of this VM, or the grpc:// addresses of its servers; a name needs Google's API client, and is untested. "
            "Or set distribution.kind='cpu'."
        ) from None
    return tf.distribute.TPUStrategy(resolver)


def _tpu_type_of_this_machine() -> str | None:
    request = urllib.request.Request(TPU_METADATA, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return str(answer.read().decode())
    except OSError:
        return None  # The TPU is in Google Cloud, and this machine is not part of it.


def _cpu(logical_devices: int) -> tf.distribute.Strategy:
    if logical_devices == 1:
        return tf.distribute.OneDeviceStrategy("/cpu:0")
    (cpu,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * logical_devices
    try:
        if tf.config.get_logical_device_configuration(cpu) != parts:
            tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:
        raise UserError(
            f"distribution.logical_devices={logical_devices}: this process has used TensorFlow already, and the CPU "
            "can only be split before. Start a new process."
        ) from None
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(logical_devices)])
