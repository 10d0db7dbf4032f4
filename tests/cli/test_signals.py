"""Signals and killed parents: every command ends, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from cli.interruption import MARK_VARIABLE, Workplace, run_campaign, until_ready, wait_for_none

from cn_clip import processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.mark.parametrize("seed", [0])
def test_a_killed_command_leaves_nothing_and_resumes(tmp_path, seed):
    place = Workplace(tmp_path, pairs=24, side=64)
    assert run_campaign(place, ["pack tar", "decontaminate"], 6, seed) == []


@pytest.mark.full
def test_a_hundred_killed_commands_leave_nothing_and_resume(tmp_path):
    place = Workplace(tmp_path)
    assert run_campaign(place, list(place.commands), 100, 0, report=print) == []


# A fake command that waits at the moment under test.
WAITING = """
import sys, time
from cn_clip import cli, processes

def waits():
    try:
        {body}
    finally:
        print("cleaned", flush=True)

def fake(*_, **__):
    waits()

cli.app = fake
from cn_clip.__main__ import main
main()
"""


READY = "print('ready', flush=True)"
SLEEPS = f"{READY}; time.sleep(60)"


def signals_as_in_a_terminal():
    """What a shell ignores for its background commands, and nohup, is inherited."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def waiting(body=SLEEPS, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(body=body), "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"preexec_fn": signals_as_in_a_terminal} | options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGHUP, "ended by SIGHUP"),
    ],
)
def test_a_signal_cleans_up_and_ends_with_its_exit_code_and_one_sentence(number, message):
    process = waiting()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "cleaned\n", f"cn-clip: {message}\n")


def test_a_signal_that_an_exception_handler_swallows_still_ends_the_command():
    """A ``__del__`` drops every exception, and the signal with it."""
    body = f"type('X', (), {{'__del__': lambda self: ({READY}, time.sleep(1))}})(); time.sleep(60)"
    process = waiting(body)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "cn-clip: ended by SIGTERM\n")
    assert out == "cleaned\n"


def test_an_error_during_shutdown_does_not_hide_the_signal():
    raises = f"try:\n {SLEEPS}\nexcept BaseException:\n raise ValueError"
    process = waiting(f"exec({raises!r})")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "cn-clip: ended by SIGTERM\n")


def cleans_up(seconds):
    """Return code whose clean-up takes ``seconds``."""
    lines = f"try:\n {SLEEPS}\nfinally:\n print('cleans', flush=True)\n time.sleep({seconds})"
    return f"exec({lines!r})"


def test_a_second_ctrl_c_at_once_does_not_disturb_the_clean_up():
    process = waiting(cleans_up(0.5))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "cleaned\n", "cn-clip: interrupted\n")


def test_a_later_ctrl_c_does_not_wait_for_the_clean_up():
    process = waiting(cleans_up(60))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans\n"
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


def test_under_nohup_a_command_outlives_its_terminal():
    process = waiting(
        f"{READY}; time.sleep(0.5)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "cleaned\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_no_traceback(number):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "cn_clip", "models"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK_VARIABLE: mark},
        preexec_fn=signals_as_in_a_terminal,
    )
    until_ready(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "Traceback" not in err


def test_a_library_leaves_signals_alone():
    before = [signal.getsignal(number) for number in processes.TERMINATION_SIGNALS]
    from cn_clip.cli import run

    assert run(["models", "--json"]) == 0
    assert [signal.getsignal(number) for number in processes.TERMINATION_SIGNALS] == before
    assert processes.received_signal() == 0


POOL = """
import os, sys, time
from cn_clip.data.process_map import parallel_map

def nap(seconds):
    try:
        os.write(1, b"started\\n")  # in one piece: two workers write
        time.sleep(seconds)
    finally:
        os.write(1, b"cleaned\\n")

if __name__ == "__main__":
    with parallel_map(nap, 2) as run:
        list(run([60, 60]))
"""

LOADER = """
import os, sys, time, torch
from cn_clip.data.loading.loader import init_worker

class Naps(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, at):
        os.write(1, b"started\\n")  # in one piece: two workers write
        time.sleep(60)

if __name__ == "__main__":
    list(torch.utils.data.DataLoader(
        Naps(), num_workers=2, worker_init_fn=init_worker, batch_size=None,
        multiprocessing_context=sys.argv[1],
    ))
"""


@pytest.mark.parametrize(
    ("program", "arguments", "cleaned"),
    [
        pytest.param(POOL, [], 2, id="pool"),
        pytest.param(LOADER, ["fork"], 0, id="fork"),
        pytest.param(LOADER, ["spawn"], 0, id="spawn", marks=pytest.mark.full),
        pytest.param(LOADER, ["forkserver"], 0, id="forkserver"),
    ],
)
def test_workers_end_with_a_parent_that_is_killed(tmp_path, program, arguments, cleaned):
    file, mark = tmp_path / "program.py", uuid.uuid4().hex
    file.write_text(program, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(file), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK_VARIABLE: mark},
    )
    assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    process.kill()
    assert wait_for_none(mark) == []
    out, _ = process.communicate()
    assert out == "cleaned\n" * cleaned


def test_an_error_ends_busy_workers(tmp_path):
    file, mark = tmp_path / "program.py", uuid.uuid4().hex
    lines = POOL.replace("list(run([60, 60]))", "next(run([1, 60])); raise ValueError('no')")
    file.write_text(lines, encoding="utf-8")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {MARK_VARIABLE: mark},
    )
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: no")
    assert done.stdout.count("started") == done.stdout.count("cleaned") > 0
    assert time.monotonic() - start < 30 and wait_for_none(mark) == []


def test_a_process_of_torchrun_receives_sigterm_when_torchrun_is_killed(tmp_path):
    mark = uuid.uuid4().hex
    child = (
        "import time\nfrom cn_clip.processes import raise_on_signals, terminate_with_launcher\n"
        "raise_on_signals(); terminate_with_launcher(); print('started', flush=True)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('saved', flush=True)\n"
    )
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK_VARIABLE: mark},
    )
    assert process.stdout.readline() == "started\n"
    process.kill()
    assert wait_for_none(mark) == []
    assert process.communicate()[0] == "saved\n"
