"""Laws of processes: new ones that do some of the work, and forked ones that cannot."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import trainer
from trainer.errors import UserError
from trainer.system import process
from trainer.system.fork import check_not_forked
from trainer.system.process import call_in_new_process, describe_end


def add(one, other, say):
    say(f"{one} and {other}")
    say(f"makes {os.getpid()}")
    return one + other


def fail():
    raise UserError("data.train='x': no such file.")


class PickyError(Exception):
    def __init__(self, one, other):
        super().__init__(one)


def fail_strangely():
    raise PickyError("a", "b")


def end(number):
    os.kill(os.getpid(), number)


def sleep(pid_file):
    pid_file.write_text(str(os.getpid()))
    time.sleep(60)


def test_a_function_is_called_in_another_process_and_its_lines_come_back_one_by_one():
    said = []
    assert call_in_new_process(add, "a", "b", say=said.append) == "ab"
    assert said[0] == "a and b"
    assert re.fullmatch(r"makes \d+", said[1])
    assert said[1] != f"makes {os.getpid()}"


def test_a_process_that_ends_before_its_stdin_is_closed_prints_nothing(monkeypatch, capfd):
    close, is_over = process._Request.close, []

    def close_late(request):
        time.sleep(1.5)  # As on a machine that has other work: the new process ends meanwhile.
        close(request)
        is_over.append(True)

    monkeypatch.setattr(process._Request, "close", close_late)
    assert call_in_new_process(os.getpid) != os.getpid()
    assert is_over
    assert capfd.readouterr() == ("", "")


def test_an_exception_of_the_function_is_raised_here_with_its_traceback():
    with pytest.raises(UserError, match=r"data\.train='x': no such file\.") as error:
        call_in_new_process(fail)
    assert "in fail\n" in str(error.value.__cause__)
    with pytest.raises(RuntimeError, match="PickyError: a"):
        call_in_new_process(fail_strangely)


def test_a_process_that_is_killed_is_an_error_that_names_the_signal():
    with pytest.raises(UserError, match=r"The process of end was killed by SIGKILL\. If this machine was short"):
        call_in_new_process(end, signal.SIGKILL)
    assert describe_end(3) == "ended with status 3"
    assert describe_end(-250) == "was killed by signal 250"


def test_a_process_that_ends_before_it_has_read_what_to_do_is_the_same_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    # More than a pipe holds, as a config is that lists very many files.
    with pytest.raises(UserError, match="The process of add ended with status 0"):
        call_in_new_process(add, "a" * 1_000_000, "b", say=print)


def test_an_error_of_say_is_raised_in_the_calling_process():
    def tell(line):
        raise BrokenPipeError(line)

    with pytest.raises(BrokenPipeError, match="a and b"):
        call_in_new_process(add, "a", "b", say=tell)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_call_whose_process_is_interrupted_or_killed_leaves_no_other(tmp_path, number):
    program = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_process import call_in_new_process, sleep
        call_in_new_process(sleep, Path({str(tmp_path / "pid")!r}))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)  # Both had the same stderr: both have ended.
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from trainer.system.process import call_in_new_process\n"
        "print('begins')\nprint(call_in_new_process(max, 1, 2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "begins\n2\n"), done.stderr


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_after_tensorflow_was_used_raises_an_error_and_does_not_hang():
    import tensorflow as tf  # Here, as the processes above import this module.

    tf.constant(1)
    uses = (
        lambda: trainer.generate("run", "once"),
        lambda: trainer.train(None),
        lambda: trainer.resume("run"),
        lambda: trainer.batches(None),
        lambda: trainer.score("run"),
    )
    for use in uses:
        child = os.fork()
        if child == 0:
            try:
                use()
            except UserError as error:
                os._exit(0 if "multiprocessing.get_context('spawn')" in str(error) else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert status == 0
    check_not_forked()  # The parent goes on.


def test_a_process_forked_before_tensorflow_is_used_may_use_it():
    program = """
        import os, trainer
        from trainer.system.fork import check_not_forked
        child = os.fork()
        if child == 0:
            check_not_forked()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
