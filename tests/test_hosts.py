"""Laws of the meeting of several workers, before TensorFlow joins them."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest

from trainer.config import DistributionConfig, UserError
from trainer.training import hosts
from trainer.training.hosts import Hosts, find_hosts, meet, meeting_secs, read_tf_config


def verdicts(workers, facts, timeout_secs=10.0):
    """What `meet` raises on each worker that comes; None where it does not. facts: by the worker's number."""
    found = {}

    def come(number):
        try:
            meet(workers, number, facts[number], timeout_secs)
            found[number] = None
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=come, args=(number,)) for number in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(found) == set(facts), "a worker still waits"
    return found


def test_workers_that_agree_go_on_and_can_meet_again_at_once(free_addresses):
    workers = free_addresses(3)
    facts = dict.fromkeys(range(3), lambda: {"the config": "same"})
    for _ in range(3):
        assert verdicts(workers, facts) == dict.fromkeys(range(3))


def test_a_worker_alone_meets_nobody():
    meet(["localhost:1"], 0, dict)


def test_a_difference_is_named_on_every_worker(free_addresses):
    workers = free_addresses(3)
    facts = {
        i: lambda i=i: {"the config": "same", "the prepared data": "other" if i == 2 else "this"} for i in range(3)
    }
    for error in verdicts(workers, facts).values():
        assert isinstance(error, UserError)
        assert f"the prepared data differs: worker 2 ({workers[2]}) has other, worker 0 has this." in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_worker_that_fails_is_named_on_the_others(failing, free_addresses):
    def fail():
        raise UserError("data.train='x': no such file.")

    workers = free_addresses(3)
    found = verdicts(workers, {i: fail if i == failing else dict for i in range(3)})
    assert str(found.pop(failing)) == "data.train='x': no such file."
    for error in found.values():
        assert f"worker {failing} ({workers[failing]}) failed: data.train='x': no such file." in str(error)


def test_a_worker_that_never_comes_is_an_error_on_all_others_in_time(free_addresses):
    workers = free_addresses(3)
    begin = time.monotonic()
    found = verdicts(workers, {0: dict, 1: dict}, timeout_secs=1.0)
    assert time.monotonic() - begin < 20
    for error in found.values():
        assert f"worker 2 ({workers[2]}) did not come within 1 s" in str(error)


def test_a_first_worker_that_never_comes_is_an_error_on_the_others(free_addresses):
    workers = free_addresses(2)
    (error,) = verdicts(workers, {1: dict}, timeout_secs=1.0).values()
    assert f"worker 0 ({workers[0]}) could not be reached within 1 s" in str(error)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""], ids=["a request", "a list", "nothing"])
def test_what_is_no_worker_may_knock(said, free_addresses, monkeypatch):
    monkeypatch.setattr(hosts, "_GREETING_SECS", 0.3)
    workers = free_addresses(2)
    has_knocked, is_over = threading.Event(), threading.Event()

    def knock():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", int(workers[0].split(":")[1])), timeout=1) as line:
                    line.sendall(said)
                    has_knocked.set()
                    is_over.wait(20)
                    return
            except OSError:
                time.sleep(0.02)

    stranger = threading.Thread(target=knock)
    stranger.start()
    leader = threading.Thread(target=meet, args=(workers, 0, dict, 10.0))
    leader.start()
    assert has_knocked.wait(10)
    meet(workers, 1, dict, 10.0)
    leader.join(10)
    assert not leader.is_alive()
    is_over.set()
    stranger.join()


def test_a_worker_does_not_take_itself_for_the_first(free_addresses, monkeypatch):
    workers = free_addresses(2)
    connect, attempts = socket.create_connection, []

    def meet_itself_at_first(address, timeout):
        attempts.append(address)
        return connect(address, timeout, source_address=address if len(attempts) == 1 else None)

    monkeypatch.setattr(socket, "create_connection", meet_itself_at_first)
    facts, found = dict.fromkeys(range(2), dict), []
    late = threading.Thread(target=lambda: (time.sleep(0.5), found.append(verdicts(workers, {0: facts[0]}))))
    late.start()
    assert verdicts(workers, {1: facts[1]}) == {1: None}
    late.join(20)
    assert found == [{0: None}]
    assert len(attempts) > 1


def test_strangers_who_say_nothing_do_not_hold_up_the_verdict(free_addresses):
    workers, lines, is_over = free_addresses(2), [], threading.Event()

    def knock():
        while not is_over.wait(0.02):
            with contextlib.suppress(OSError):
                lines.append(socket.create_connection(("127.0.0.1", int(workers[0].split(":")[1])), timeout=1))

    stranger = threading.Thread(target=knock)
    stranger.start()
    begin = time.monotonic()
    (error,) = verdicts(workers, {0: dict}, timeout_secs=1.0).values()
    assert time.monotonic() - begin < 4
    is_over.set()
    stranger.join()
    for line in lines:
        line.close()
    assert lines
    assert f"worker 1 ({workers[1]}) did not come within 1 s" in str(error)


def tf_config(workers=("a:1", "b:2"), kind="worker", index=1, **more):
    return json.dumps({"cluster": {"worker": workers, **more}, "task": {"type": kind, "index": index}})


def test_tf_config_is_read():
    hosts = read_tf_config(tf_config())
    assert hosts == Hosts(("a:1", "b:2"), 1)
    assert hosts.are_several
    assert not hosts.is_chief
    assert read_tf_config(tf_config(index=0)).is_chief


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "TF_CONFIG is not set"),
        ("", "TF_CONFIG is not set"),
        ("{", "is not what it should be"),
        ("[]", "is not what it should be"),
        ('{"cluster": {"worker": ["a:1"]}}', "is not what it should be"),
        (tf_config(index=2), "task.index=2 must be a number from 0 to 1"),
        (tf_config(index="1"), "task.index='1' must be a number from 0 to 1"),
        (tf_config(kind="chief"), "has a task that is no worker"),
        (tf_config(ps=["c:3"]), "has a task that is no worker"),
        (tf_config(workers=["a:1", "a:1"]), "must list a different host:port for each worker"),
        (tf_config(workers=["a", "b"]), "must list a different host:port for each worker"),
        (tf_config(workers=[]), "must list a different host:port for each worker"),
    ],
)
def test_a_tf_config_that_is_not_right_says_what_is_wrong(text, message):
    with pytest.raises(UserError) as error:
        read_tf_config(text)
    assert message in str(error.value)
    assert "scripts/launch_local" in str(error.value)


def test_several_hosts_are_found_where_tf_config_names_them(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_hosts(DistributionConfig()) == Hosts()
    with pytest.raises(UserError, match="TF_CONFIG is not set"):
        find_hosts(DistributionConfig(kind="multi_worker"))
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert find_hosts(DistributionConfig()).number == 1
    assert find_hosts(DistributionConfig(kind="cpu")) == Hosts()


def test_gpus_of_one_machine_are_not_ignored_by_several(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config())
    for kind in ("auto", "multi_worker"):
        with pytest.raises(UserError, match=r"distribution\.gpus=\[0, 1\] does not go with the 2 workers of TF_CONFIG"):
            find_hosts(DistributionConfig(kind=kind, gpus=(0, 1)))
    # Named for this machine alone, which `make_strategy` sees to.
    assert find_hosts(DistributionConfig(kind="gpu", gpus=(0, 1))) == Hosts()
    monkeypatch.setenv("TF_CONFIG", tf_config(workers=["a:1"], index=0))
    assert not find_hosts(DistributionConfig(kind="multi_worker", gpus=(0, 1))).are_several


@pytest.fixture
def slurm_task(monkeypatch):
    """A function that makes this process a task of a SLURM step, as srun would."""

    def become(nodes, tasks, node, local_id=0, rank=0, count=2, job="7"):
        # Set first, so that what find_hosts sets goes away with the test.
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
def test_tasks_of_a_slurm_step_are_the_workers_and_tf_config_says_so(slurm_task, monkeypatch, kind):
    slurm_task("node[01-02]", "1(x2)", "node02", rank=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    hosts = find_hosts(DistributionConfig(kind=kind))
    assert hosts == Hosts(("node01:10700", "node02:10700"), 1)
    assert read_tf_config(os.environ["TF_CONFIG"]) == hosts
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
    assert find_hosts(DistributionConfig()) == Hosts(workers, number)


def test_slurm_jobs_that_follow_each_other_have_ports_of_their_own(slurm_task, monkeypatch):
    ports = []
    for job in ("199", "200", "201"):
        slurm_task("node1", "2", "node1", job=job)
        ports += [int(worker.split(":")[1]) for worker in find_hosts(DistributionConfig()).workers]
    assert ports == [29900, 29901, 10000, 10001, 10100, 10101]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "many", "SLURM_STEP_NUM_TASKS='many' must be a number"),
        ("SLURM_STEP_NUM_TASKS", "3", "SLURM_STEP_NUM_TASKS='3', SLURM_STEP_NODELIST='node[1-2]', "),
        ("SLURM_PROCID", None, "SLURM_PROCID (not set) must be a number"),
        ("SLURM_JOB_ID", "7_1", "SLURM_JOB_ID='7_1' must be a number"),
        ("SLURM_LOCALID", "-1", "SLURM_LOCALID='-1' must be a number"),
        ("SLURM_LOCALID", "1", "SLURMD_NODENAME='node1', SLURM_LOCALID='1' is none of the tasks"),
        ("SLURMD_NODENAME", None, "SLURMD_NODENAME (not set), SLURM_LOCALID='0' is none of the tasks"),
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
        find_hosts(DistributionConfig())
    assert message in str(error.value)
    assert "Start the workers with srun, as scripts/slurm_train does, or set TF_CONFIG on each." in str(error.value)
    assert "TF_CONFIG" not in os.environ


def test_slurm_is_not_asked_where_one_process_is_meant_or_tf_config_is_set(slurm_task, monkeypatch):
    slurm_task("node[1-2]", "1(x2)", "node1")
    assert find_hosts(DistributionConfig(kind="cpu")) == Hosts()
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert find_hosts(DistributionConfig()).workers == ("a:1", "b:2")
    slurm_task("node1", "1", "node1", count=1)
    assert find_hosts(DistributionConfig()) == Hosts()


def test_workers_wait_as_long_as_they_are_told(monkeypatch, free_addresses):
    monkeypatch.delenv("TRAINER_MEETING_SECS", raising=False)
    assert meeting_secs() == 45.0
    monkeypatch.setenv("TRAINER_MEETING_SECS", "1")
    with pytest.raises(UserError, match="could not be reached within 1 s"):
        meet(free_addresses(2), 1, dict)
    for text in ("", "0", "soon", "1.5"):
        monkeypatch.setenv("TRAINER_MEETING_SECS", text)
        with pytest.raises(UserError, match=rf"TRAINER_MEETING_SECS='{text}' must be a whole number of seconds"):
            meeting_secs()
