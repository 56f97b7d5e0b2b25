"""Laws of who the workers of a run are."""

import json
import os

import pytest

from trainer.commands.doctor import check_workers
from trainer.config.settings import DistributionConfig
from trainer.distributed.workers import Workers, describe_loss, find_workers, read_tf_config, split_address
from trainer.errors import UserError


def tf_config(workers=("a:1", "b:2"), kind="worker", index=1, **more):
    return json.dumps({"cluster": {"worker": workers, **more}, "task": {"type": kind, "index": index}})


def test_tf_config_is_read():
    workers = read_tf_config(tf_config())
    assert workers == Workers(("a:1", "b:2"), 1)
    assert workers.are_several
    assert not workers.is_chief
    assert read_tf_config(tf_config(index=0)).is_chief


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "TF_CONFIG is not set"),
        ("", "TF_CONFIG is not set"),
        ("{}", "TF_CONFIG='{}' names no cluster"),
        ('{"cluster": {}, "environment": "cloud"}', "names no cluster"),
        ("{", "TF_CONFIG='{' is not what it should be, JSON"),
        ("[" * 200_000, "is not what it should be, JSON (maximum recursion depth exceeded"),
        ("[]", "is not what it should be, a JSON object"),
        ('{"cluster": {"worker": ["a:1"]}}', "must have a cluster, and a task with type and index"),
        ('{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}', "must have a cluster, and a task with type"),
        ('{"cluster": {"worker": ["a:1"]}, "task": [0]}', "must have a cluster, and a task with type and index"),
        (tf_config(index=2), "task.index=2 must be a number from 0 to 1"),
        (tf_config(index=-1), "task.index=-1 must be a number from 0 to 1"),
        (tf_config(index="1"), "task.index='1' must be a number from 0 to 1"),
        (tf_config(index=True), "task.index=True must be a number from 0 to 1"),
        (tf_config(kind="chief", index=0), "task.index=0 must be the index of a chief in the cluster"),
        (tf_config(kind="evaluator"), "must have only workers, with or without one chief; leave out 'evaluator'"),
        (tf_config(kind=["worker"]), "must have only workers"),
        (tf_config(ps=["c:3"]), "must have only workers, with or without one chief; leave out 'ps'"),
        (tf_config(chief=["c:3", "d:4"]), "must list a different host:port for each worker, and at most one chief"),
        (tf_config(chief=["a:1"]), "must list a different host:port for each worker"),
        (tf_config(workers=["a:1", "a:1"]), "must list a different host:port for each worker"),
        (tf_config(workers=["a:1", "A:1"]), "must list a different host:port for each worker"),
        (tf_config(workers=["a", "b"]), "cluster.worker=['a', 'b'] must list a host:port for each"),
        (tf_config(workers=["a:x", "b:2"]), "cluster.worker=['a:x', 'b:2'] must list a host:port for each"),
        (tf_config(workers="a:1"), "cluster.worker='a:1' must list a host:port for each"),
        (tf_config(workers=[["a:1"], 2]), "must list a host:port for each"),
        (tf_config(workers=[]), "must list a different host:port for each worker"),
    ],
)
def test_a_wrong_tf_config_is_an_error_that_names_the_fault(text, message):
    with pytest.raises(UserError) as error:
        read_tf_config(text)
    assert message in str(error.value)
    assert "scripts/launch/local.py" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "address",
    [
        *("a", "a:", ":1", "a:x", "a:0", "a:65536", "a:99999", "a:-1", "a:1.0", "a:²", "a b:1", "a\n:1", "한:1"),
        *("::1:1", "[::1]", "[::1]1", "[a]:1", "[::1:1", "user@a:1", "http://a:1", "a..b:1", f"{'a' * 64}:1"),
        f"a:{'1' * 5000}",
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError):
        split_address(address)
    with pytest.raises(UserError, match=r"must list a host:port for each, such as \"10\.0\.0\.1:2222\""):
        read_tf_config(tf_config(workers=("b:2", address)))


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("Node-1.example.com:65535", "node-1.example.com", 65535),
        ("my_service:2222", "my_service", 2222),
        ("10.0.0.1:2222", "10.0.0.1", 2222),
        ("[::1]:2222", "::1", 2222),
        ("[FD00:0::2]:2222", "fd00::2", 2222),
    ],
)
def test_an_address_is_a_host_and_a_port(address, host, port):
    assert split_address(address) == (host, port)
    assert read_tf_config(tf_config(workers=("b:2", address))).addresses == ("b:2", address)


def test_a_chief_is_the_first_worker_for_trainer_and_for_tensorflow(monkeypatch):
    for kind, index, number in (("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)):
        monkeypatch.setenv("TF_CONFIG", tf_config(kind=kind, index=index, chief=["c:3"]))
        workers = find_workers(DistributionConfig())
        assert workers == Workers(("c:3", "a:1", "b:2"), number)
        assert json.loads(os.environ["TF_CONFIG"]) == json.loads(tf_config(workers.addresses, index=number))


def tfjob(kind, index, *kinds):
    """TF_CONFIG as Kubeflow's training-operator 1.9 writes it for a pod of a TFJob with two of each of the kinds."""
    cluster = {name: [f"gpt-{name}-{i}.team.svc:2222" for i in range(1 if name == "chief" else 2)] for name in kinds}
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}, "environment": "cloud"})


def test_the_pods_of_a_tfjob_are_workers_whose_chief_comes_first(monkeypatch):
    names = ("gpt-worker-0.team.svc:2222", "gpt-worker-1.team.svc:2222")
    for kinds, addresses in ((("worker",), names), (("chief", "worker"), ("gpt-chief-0.team.svc:2222", *names))):
        numbers = []
        for kind, index in (*(("chief", 0) for _ in kinds[1:]), ("worker", 0), ("worker", 1)):
            monkeypatch.setenv("TF_CONFIG", tfjob(kind, index, *kinds))
            workers = find_workers(DistributionConfig())
            assert workers.addresses == addresses
            numbers.append(workers.number)
        assert numbers == list(range(len(addresses)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tfjob("worker", 0, "ps", "worker"), "must have only workers, with or without one chief; leave out 'ps'"),
        (tfjob("ps", 1, "chief", "ps", "worker"), "leave out 'ps'"),
        # The evaluator is not in its own cluster.
        (tfjob("evaluator", 0, "chief", "worker"), "leave out 'evaluator'"),
        (
            '{"sparseCluster": {"worker": {"1": "a:1"}, "ps": []}, "task": {"type": "worker", "index": 1}}',
            "a sparseClu",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "multi_worker"])
def test_other_kinds_of_tfjobs_are_refused_by_name(monkeypatch, kind, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=message):
        find_workers(DistributionConfig(kind=kind))


def test_several_workers_are_found_if_tf_config_names_them(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_workers(DistributionConfig()) == Workers()
    with pytest.raises(UserError, match="TF_CONFIG is not set"):
        find_workers(DistributionConfig(kind="multi_worker"))
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert find_workers(DistributionConfig()).number == 1
    assert find_workers(DistributionConfig(kind="cpu")) == Workers()


@pytest.mark.parametrize("text", ["", "{}", '{"cluster": {}, "task": {}, "environment": "cloud"}'])
def test_a_tf_config_without_a_cluster_means_a_single_worker(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    assert find_workers(DistributionConfig()) == Workers()
    with pytest.raises(UserError, match=r"distribution\.kind='multi_worker', but TF_CONFIG.*Set it on every worker"):
        find_workers(DistributionConfig(kind="multi_worker"))


# Messages of TensorFlow 2.21 on worker 0: of three workers, after worker 1 was killed; of two, after it was stopped.
GONE = """Graph execution error:

Detected at node while/CollectiveReduceV2 defined at (most recent call last):
  File "/home/me/train.py", line 4, in <module>

Collective ops is aborted by: Collective ops is aborted by: recvmsg:Connection reset by peer
Additional GRPC error information from remote target /job:worker/replica:0/task:1 while calling /tensorflow.WorkerSer\
vice/RecvBuf:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"recvmsg:Connection reset by peer"}
The error could be from a previous operation. Restart your program to reset.
Additional GRPC error information from remote target /job:worker/replica:0/task:2 while calling /tensorflow.WorkerSer\
vice/RecvBuf:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Collective ops is aborted by: recvmsg:Connection re\
set by peer\\nAdditional GRPC error information from remote target /job:worker/replica:0/task:1 while calling /tensor\
flow.WorkerService/RecvBuf:\\n:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:\\"recvmsg:Connection r\
eset by peer\\"}\\nThe error could be from a previous operation. Restart your program to reset."}
The error could be from a previous operation. Restart your program to reset.
\t [[{{node while/CollectiveReduceV2}}]] [Op:__inference__run_steps_1823]"""
SILENT = """Collective ops is aborted by: Error reported from /job:worker/task:0: The following tasks are unhealthy (st\
opped sending heartbeats):
/job:worker/replica:0/task:1
The tasks have crashed. Check the task logs for an earlier error, or scheduler events (e.g. preemption, eviction) to d\
ebug further."""


def test_an_error_of_the_collectives_names_the_lost_worker_and_the_reason():
    workers = Workers(("a:1", "b:2", "c:3"), 0)
    assert str(describe_loss(GONE, workers)).startswith(
        "worker 1 (b:2) broke its connection (recvmsg:Connection reset by peer). See its own last lines"
    )
    assert str(describe_loss(SILENT, workers)).startswith("worker 1 (b:2) stopped answering. See its own last lines")
    for message, who in (
        # The first worker is gone, and stopped.
        ("Failed to send RPC to coordination service. Either the leader task was preempted", "worker 0 (a:1) broke"),
        ("Deadline Exceeded\n\nRPC: /tensorflow.CoordinationService/Heartbeat\n", "worker 0 (a:1) stopped answering."),
        ("cluster check alive failed, /job:worker/replica:0/task:2 is down", "worker 2 (c:3) broke its connection"),
        ("Cancelled", "another worker broke its connection (Cancelled)."),
    ):
        assert str(describe_loss(f"Collective ops is aborted by: {message}", workers)).startswith(who)
    assert describe_loss("OOM when allocating tensor", workers) is None
    assert describe_loss(GONE, Workers()) is None


def test_gpus_of_one_machine_are_not_ignored_by_several(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config())
    for kind in ("auto", "multi_worker"):
        with pytest.raises(
            UserError, match=r"distribution\.gpus=\[0, 1\] cannot be used with the 2 workers of TF_CONFIG"
        ):
            find_workers(DistributionConfig(kind=kind, gpus=(0, 1)))
    # GPUs of this machine only: `make_strategy` uses them.
    assert find_workers(DistributionConfig(kind="gpu", gpus=(0, 1))) == Workers()
    monkeypatch.setenv("TF_CONFIG", tf_config(workers=["a:1"], index=0))
    assert not find_workers(DistributionConfig(kind="multi_worker", gpus=(0, 1))).are_several


@pytest.fixture
def slurm_task(monkeypatch):
    """A function that makes this process a task of a SLURM step, as srun would."""

    def become(nodes, tasks, node, local_id=0, rank=0, count=2, job="7"):
        # Set first, so that what find_workers sets goes away with the test.
        monkeypatch.setenv("TF_CONFIG", "")
        monkeypatch.delenv("TF_CONFIG")
        for name, value in {
            "SLURM_STEP_NUM_TASKS": count,
            "SLURM_STEP_NODELIST": nodes,
            "SLURM_STEP_TASKS_PER_NODE": tasks,
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": local_id,
            "SLURMD_NODENAME": node,
            "SLURM_JOB_ID": job,
        }.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.mark.parametrize("kind", ["auto", "multi_worker"])
def test_tasks_of_a_slurm_step_are_the_workers_of_tf_config(slurm_task, monkeypatch, kind):
    slurm_task("node[01-02]", "1(x2)", "node02", rank=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    workers = find_workers(DistributionConfig(kind=kind))
    assert workers == Workers(("node01:10700", "node02:10700"), 1)
    assert read_tf_config(os.environ["TF_CONFIG"]) == workers
    # GPUs are SLURM's to share out.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("nodes", "tasks", "count", "node", "local_id", "workers", "number"),
    [
        ("node1", "2", 2, "node1", 1, ("node1:10700", "node1:10701"), 1),
        ("node[01-03]", "1(x3)", 3, "node03", 0, ("node01:10700", "node02:10700", "node03:10700"), 2),
        ("a,b[7,9]", "2(x2),1", 5, "b7", 1, ("a:10700", "a:10701", "b7:10700", "b7:10701", "b9:10700"), 3),
        # SLURM counts node9 first, the resolver sorts it last.
        ("node[9-10]", "1(x2)", 2, "node9", 0, ("node10:10700", "node9:10700"), 1),
    ],
)
def test_a_slurm_task_finds_its_own_address(slurm_task, nodes, tasks, count, node, local_id, workers, number):
    slurm_task(nodes, tasks, node, local_id, count=count)
    assert find_workers(DistributionConfig()) == Workers(workers, number)


def test_slurm_jobs_that_follow_each_other_have_ports_of_their_own(slurm_task, monkeypatch):
    ports = []
    for job in ("199", "200", "201"):
        slurm_task("node1", "2", "node1", job=job)
        ports += [int(worker.split(":")[1]) for worker in find_workers(DistributionConfig()).addresses]
    assert ports == [29900, 29901, 10000, 10001, 10100, 10101]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "many", "SLURM_STEP_NUM_TASKS='many' must be a number"),
        ("SLURM_STEP_NUM_TASKS", "3", "SLURM_STEP_NUM_TASKS='3', SLURM_STEP_NODELIST='node[1-2]', "),
        ("SLURM_PROCID", None, "SLURM_PROCID (not set) must be a number"),
        ("SLURM_JOB_ID", "7_1", "SLURM_JOB_ID='7_1' must be a number"),
        ("SLURM_JOB_ID", "7" * 5000, "7... must be a number"),
        ("SLURM_JOB_ID", "²", "SLURM_JOB_ID='²' must be a number"),
        ("SLURM_LOCALID", "-1", "SLURM_LOCALID='-1' must be a number"),
        ("SLURM_LOCALID", "1", "SLURMD_NODENAME='node1', SLURM_LOCALID='1' is not one of the tasks"),
        ("SLURMD_NODENAME", None, "SLURMD_NODENAME (not set), SLURM_LOCALID='0' is not one of the tasks"),
        ("SLURM_STEP_NODELIST", None, "SLURM_STEP_NODELIST (not set)"),
        ("SLURM_STEP_NODELIST", "node[1-2", "SLURM_STEP_NODELIST='node[1-2', "),
        ("SLURM_STEP_NODELIST", "", "SLURM_STEP_NODELIST='', "),
        ("SLURM_STEP_TASKS_PER_NODE", None, "SLURM_STEP_TASKS_PER_NODE (not set)"),
        ("SLURM_STEP_TASKS_PER_NODE", "1x2", "SLURM_STEP_TASKS_PER_NODE='1x2'"),
    ],
)
def test_a_slurm_environment_that_is_not_right_names_the_variable(slurm_task, monkeypatch, name, value, message):
    slurm_task("node[1-2]", "1(x2)", "node1")
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        find_workers(DistributionConfig())
    assert message in str(error.value)
    assert "Start the workers with srun, as scripts/launch/slurm does, or set TF_CONFIG on each." in str(error.value)
    assert "TF_CONFIG" not in os.environ


def test_slurm_is_ignored_for_one_process_or_if_tf_config_is_set(slurm_task, monkeypatch):
    slurm_task("node[1-2]", "1(x2)", "node1")
    assert find_workers(DistributionConfig(kind="cpu")) == Workers()
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert find_workers(DistributionConfig()).addresses == ("a:1", "b:2")
    slurm_task("node1", "1", "node1", count=1)
    assert find_workers(DistributionConfig()) == Workers()


@pytest.mark.parametrize(
    ("environ", "cause", "repair"),
    [
        ({"TF_CONFIG": "{"}, "TF_CONFIG='{' is not what it should be, JSON", "Set it on every worker, as in"),
        ({"TF_CONFIG": json.dumps({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 3}})},
         "task.index=3 must be a number from 0 to 0", "Set it on every worker, as in"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID (not set) must be a number", "Start the workers with srun"),
    ],
)  # fmt: skip
def test_the_doctor_names_what_is_wrong_with_the_workers_and_the_repair(environ, cause, repair, monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (found,) = check_workers(DistributionConfig())
    assert found.level == "error" and cause in found.what and found.repair.startswith(repair)
