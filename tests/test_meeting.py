"""Laws of the meeting of several workers, before TensorFlow joins them."""

import contextlib
import json
import random
import secrets
import socket
import threading
import time

import pytest

from trainer.distributed import meeting
from trainer.distributed.connection import listen
from trainer.distributed.meeting import Meeting, meeting_secs
from trainer.distributed.workers import Workers, split_address
from trainer.errors import UserError


def meet(workers, number, facts, timeout_secs=10.0):
    with Meeting(Workers(tuple(workers), number), timeout_secs) as each:
        each.agree(facts())


def verdicts(workers, facts, timeout_secs=10.0):
    """What a meeting raises on each worker that comes; None if nothing. facts: a function for each worker's number."""
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


def same(count):
    return dict.fromkeys(range(count), lambda: {"the config": "same"})


@contextlib.contextmanager
def in_the_background(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


def connect(workers):
    """A connection to the chief, once it listens."""
    until = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(split_address(workers[0]), timeout=10)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


def greet(workers, number):
    """Connects as a worker that has the secret; returns the connection and the chief's answer."""
    connection = connect(workers)
    text = connection.makefile("rb").readline().decode()
    theirs, ours = text.split()[1], secrets.token_hex(16)
    proof = Meeting(Workers(tuple(workers), number))._proof("worker", number, theirs, ours)
    connection.sendall(f"{number} {ours} {proof}\n".encode())
    return connection, connection.makefile("rb").readline()


def test_workers_that_agree_go_on_and_can_meet_again_at_once(free_addresses):
    workers = free_addresses(3)
    for _ in range(3):
        assert verdicts(workers, same(3)) == dict.fromkeys(range(3))


def test_a_single_worker_connects_to_no_one():
    meet(["127.0.0.1:1"], 0, dict)


def test_a_difference_is_named_on_every_worker(free_addresses):
    workers = free_addresses(3)
    facts = {i: lambda i=i: {"train.seed": "0", "the data": "other" if i == 2 else "this"} for i in range(3)}
    for error in verdicts(workers, facts).values():
        assert isinstance(error, UserError)
        assert f"the data differs: worker 2 ({workers[2]}) has other, worker 0 has this." in str(error)
    facts[0], facts[2] = dict, facts[1]
    for error in verdicts(workers, facts).values():
        assert "train.seed differs: worker " in str(error)
        assert "has 0, worker 0 has None" in str(error)


def test_thousands_of_files_are_compared_and_a_difference_among_them_is_shown(free_addresses):
    workers = free_addresses(2)
    files = [f"/data/books/of/many/shelves/book-{i:05}.txt.gz" for i in range(20_000)]
    listed = {number: json.dumps(files) for number in range(2)}
    facts = {number: lambda number=number: {"data.train": listed[number]} for number in range(2)}
    assert verdicts(workers, facts) == dict.fromkeys(range(2))
    listed[1] = json.dumps([*files[:10_000], "/data/other.txt", *files[10_001:]])
    for error in verdicts(workers, facts).values():
        assert "/data/other.txt" in str(error)
        assert "book-10000" in str(error)
        assert len(str(error)) < 2000


@pytest.mark.parametrize("failing", [0, 1])
def test_a_worker_that_fails_is_named_on_the_others(failing, free_addresses):
    def fail():
        raise UserError("data.train='x': no such file.")

    workers = free_addresses(3)
    found = verdicts(workers, {i: fail if i == failing else dict for i in range(3)})
    assert str(found.pop(failing)) == "data.train='x': no such file."
    for error in found.values():
        assert f"worker {failing} ({workers[failing]}) failed: data.train='x': no such file." in str(error)


def test_messages_of_other_workers_are_printed_without_control_characters(free_addresses):
    def fail():
        raise UserError("\x1b[31mred\x07 한글\n\u202e" + "x" * 10_000)

    found = verdicts(free_addresses(2), {0: dict, 1: fail})
    assert "failed: \\x1b[31mred\\x07 한글\\n\\u202exxx" in str(found[0])
    assert len(str(found[0])) < 1000


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


def test_a_worker_does_not_take_itself_for_the_chief(free_addresses, monkeypatch):
    workers = free_addresses(2)
    connect_for_real, attempts = socket.create_connection, []

    def meet_itself_at_first(address, timeout):
        attempts.append(address)
        return connect_for_real(address, timeout, source_address=address if len(attempts) == 1 else None)

    monkeypatch.setattr(socket, "create_connection", meet_itself_at_first)
    found = []
    with in_the_background(lambda: (time.sleep(0.5), found.append(verdicts(workers, {0: dict})))):
        assert verdicts(workers, {1: dict}) == {1: None}
    assert found == [{0: None}]
    assert len(attempts) > 1


def test_the_others_begin_when_the_first_is_done(free_addresses):
    workers, done = free_addresses(3), []

    def come(number):
        with Meeting(Workers(tuple(workers), number), 10.0) as each:
            assert each.in_turn(lambda: (time.sleep(0.0 if number else 0.3), done.append(number), number)[2]) == number
            each.agree({})

    with in_the_background(come, 1), in_the_background(come, 2):
        come(0)
    assert done[0] == 0
    assert sorted(done) == [0, 1, 2]


@pytest.mark.slow
def test_what_a_worker_does_between_may_take_longer_than_a_silence_but_a_silence_is_a_loss(free_addresses, monkeypatch):
    # Fifteen signs of life long: on a busy machine a thread can wait a second for a core.
    monkeypatch.setattr(meeting, "SILENCE_SECS", 3.0)
    monkeypatch.setattr(meeting, "_SIGN_OF_LIFE_SECS", 0.2)
    for busy in (0, 2):
        facts = {number: (lambda: time.sleep(5.0) or {}) if number == busy else dict for number in range(3)}
        assert verdicts(free_addresses(3), facts) == dict.fromkeys(range(3))
    # As a process that SIGSTOP has stopped: connected, and silent.
    workers, silent = free_addresses(3), []
    with in_the_background(lambda: silent.append(greet(workers, 2))):
        for error in verdicts(workers, {0: dict, 1: dict}).values():
            assert f"worker 2 ({workers[2]}) was silent for 3 s and counts as lost before the start" in str(error)
    silent[0][0].close()


# Who may come.


def test_workers_need_the_same_secret_and_the_same_cluster(free_addresses, monkeypatch):
    workers = free_addresses(2)
    monkeypatch.setenv("TRAINER_MEETING_SECRET", "한글 and more")
    assert verdicts(workers, same(2)) == {0: None, 1: None}
    found = {}

    def come(number, workers):
        try:
            meet(workers, number, dict, timeout_secs=1.5)
        except UserError as error:
            found[number] = str(error)

    chief = Meeting(Workers(tuple(workers), 0), 1.5)

    def lead():
        try:
            chief.__enter__()
        except UserError as error:
            found[0] = str(error)

    monkeypatch.setenv("TRAINER_MEETING_SECRET", "another")
    with in_the_background(lead):
        come(1, workers)
    assert "refused worker 1: both need the same cluster in TF_CONFIG and the same TRAINER_MEETING_SECRET" in found[1]
    assert f"worker 1 ({workers[1]}) did not come within 2 s" in found[0]
    assert "connections were refused: they did not prove to be a missing worker" in found[0]
    with in_the_background(come, 0, workers):
        come(1, [workers[0], "127.0.0.1:1"])
    assert "refused worker 1" in found[1]


def test_the_secret_is_not_sent_and_a_process_without_it_is_refused(free_addresses, monkeypatch):
    monkeypatch.setenv("TRAINER_MEETING_SECRET", "open sesame")
    workers, heard = free_addresses(2), []

    def play_the_first():
        with socket.create_server(split_address(workers[0])) as listener:
            listener.settimeout(10)
            while len(heard) < 3:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"trainer-meeting " + b"0" * 32 + b"\n")
                    heard.append(connection.recv(1000))
                    connection.sendall((b"welcome " + b"0" * 64 + b"\n", heard[-1], b"\x1b[31m" * 200)[len(heard) - 1])

    with in_the_background(play_the_first):
        (error,) = verdicts(workers, {1: dict}, timeout_secs=1.5).values()
    assert f"worker 0 ({workers[0]}) " in str(error)
    assert "\x1b" not in str(error)
    assert len(set(heard)) == 3  # No greeting can be used again.
    assert not any(b"sesame" in greeting for greeting in heard)


def test_the_first_process_stays_and_one_that_ends_frees_its_place(free_addresses, monkeypatch):
    workers, found = free_addresses(3), {}
    with in_the_background(lambda: found.update(verdicts(workers, {0: dict}))):
        gone, answer = greet(workers, 1)
        assert answer.startswith(b"welcome ")
        gone.close()
        time.sleep(0.3)
        with in_the_background(lambda: found.update(verdicts(workers, {1: dict}))):
            time.sleep(0.3)
            connection, answer = greet(workers, 1)
            assert (answer, connection.recv(10)) == (b"taken\n", b"")
            connection.close()
            (error,) = verdicts(workers, {1: dict}, timeout_secs=1.0).values()
            assert f"worker 0 ({workers[0]}) refused worker 1: another process came as worker 1 first" in str(error)
            found.update(verdicts(workers, {2: dict}))
    assert found == dict.fromkeys(range(3))


@pytest.mark.parametrize("number", [0, 3, 7, 999_999])
def test_a_number_that_no_worker_has_is_refused_though_it_knows_the_secret(number, free_addresses):
    workers = free_addresses(3)
    with in_the_background(verdicts, workers, {0: dict}, 0.7):
        connection, answer = greet(workers, number)
        assert answer == b"refused\n"
        connection.close()


def test_a_worker_listens_only_at_its_own_address(free_addresses):
    (address,) = free_addresses(1)
    (listener,) = listen(address)
    with listener, pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", split_address(address)[1]), timeout=5)
    # A name that stands for nothing here, and an address (of documentation) that this host does not have.
    for elsewhere in ("no-such-host.invalid", "192.0.2.111"):
        (listener,) = listen(f"{elsewhere}:{split_address(address)[1]}")
        with listener:
            connect([address]).close()


def test_a_port_that_is_taken_is_an_error(free_addresses):
    workers = free_addresses(2)
    with socket.create_server(split_address(workers[0])):
        (error,) = verdicts(workers, {0: dict}).values()
    assert f"TF_CONFIG: this worker cannot listen at its address {workers[0]}: " in str(error)


def test_workers_meet_by_ipv6_and_by_name(free_addresses):
    ports = [address.rpartition(":")[2] for address in free_addresses(2)]
    hosts = ["localhost", "[::1]"]
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        hosts = ["localhost"]  # This machine has no IPv6.
    for host in hosts:
        assert verdicts([f"{host}:{port}" for port in ports], same(2)) == {0: None, 1: None}


# Strangers.


def slowly(text):
    def send(connection):
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    return send


def all_of(text):
    return lambda connection: connection.sendall(text)


def random_bytes(connection):
    connection.sendall(random.randbytes(random.randrange(1, 2000)))


def guess(connection):
    connection.sendall(f"1 {secrets.token_hex(16)} {secrets.token_hex(32)}\n".encode())


STRANGERS = {
    "is silent": all_of(b""),
    "closes": lambda connection: connection.close(),
    "a request": all_of(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a TLS greeting": all_of(bytes.fromhex("1603010200010001fc0303") + bytes(500)),
    "brackets": all_of(b"[" * 200_000),
    "a line of brackets": all_of(b"[" * 200_000 + b"\n"),
    "an index and silence": all_of(b'{"index": 1}\n'),
    "a list": all_of(b"[1]\n"),
    "an infinite index": all_of(b'{"index": 1e999}\n'),
    "a byte now and then": slowly(b'{"index": 1}' * 20),
    "a greeting byte by byte": slowly(b"1 " + b"0" * 32),
    "an index out of range": all_of(b"7 " + b"0" * 32 + b" " + b"0" * 64 + b"\n"),
    "a wrong proof": guess,
    "a huge number": all_of(b"9" * 250 + b" 0 0\n"),
    "empty lines": all_of(b"\n" * 10_000),
    "control characters": all_of(b"\x1b]0;owned\x07\x1b[2J\x00\xff\xfe\n"),
    "random bytes": random_bytes,
}


def meet_among_strangers(workers, names, pause=0.02):
    """What a meeting raises on each of three workers, and the seconds it takes, while strangers of these sorts knock
    again and again, and stay.
    """
    is_over, connections = threading.Event(), []

    def knock(name):
        while not is_over.wait(pause):
            with contextlib.suppress(OSError):
                connection = socket.create_connection(split_address(workers[0]), timeout=1)
                connections.append(connection)
                STRANGERS[name](connection)

    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(in_the_background(knock, name))
        stack.callback(is_over.set)
        found = {}
        with in_the_background(lambda: found.update(verdicts(workers, {0: dict, 1: dict}))):
            time.sleep(0.3)
            found.update(verdicts(workers, {2: dict}))
    secs = time.monotonic() - begin
    num_knocks = len(connections)
    for connection in connections:
        connection.close()
    return found, secs, num_knocks


def test_strangers_of_every_sort_neither_hold_up_a_meeting_nor_end_it(free_addresses, capfd):
    found, secs, num_knocks = meet_among_strangers(free_addresses(3), STRANGERS)
    assert found == dict.fromkeys(range(3))
    assert secs < 10
    assert num_knocks > len(STRANGERS)
    assert capfd.readouterr() == ("", "")


def test_one_stranger_who_never_ends_costs_a_worker_nothing(free_addresses):
    for name in ("is silent", "a byte now and then"):
        found, secs, _ = meet_among_strangers(free_addresses(3), [name], pause=1.0)
        assert found == dict.fromkeys(range(3))
        assert secs < 4, name


def test_silent_strangers_do_not_delay_the_verdict(free_addresses):
    workers, lines, is_over = free_addresses(2), [], threading.Event()

    def knock():
        while not is_over.wait(0.005):
            with contextlib.suppress(OSError):
                lines.append(socket.create_connection(split_address(workers[0]), timeout=1))

    with in_the_background(knock):
        begin = time.monotonic()
        (error,) = verdicts(workers, {0: dict}, timeout_secs=1.0).values()
        assert time.monotonic() - begin < 4
        is_over.set()
    for line in lines:
        line.close()
    assert len(lines) > meeting._MAX_STRANGERS  # More than it keeps open.
    assert f"worker 1 ({workers[1]}) did not come within 1 s" in str(error)


def test_workers_wait_as_long_as_the_variable_says(monkeypatch, free_addresses):
    monkeypatch.delenv("TRAINER_MEETING_SECS", raising=False)
    assert meeting_secs() == 45.0
    monkeypatch.setenv("TRAINER_MEETING_SECS", "1")
    with (
        pytest.raises(UserError, match="could not be reached within 1 s"),
        Meeting(Workers(tuple(free_addresses(2)), 1)),
    ):
        pass
    for text in ("", "0", "soon", "1.5", "-1", "1e3", "9" * 5000, "²"):
        monkeypatch.setenv("TRAINER_MEETING_SECS", text)
        with pytest.raises(UserError, match=rf"TRAINER_MEETING_SECS='{text}' must be a whole number of seconds"):
            meeting_secs()
