"""No command ends in a traceback, hangs or touches an input, whatever it is given."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzz import commands

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the odd places are those of Linux")


def check(runs):
    bad = [ran for ran in runs if ran.faults]
    assert not bad, "\n".join(commands.table(bad))


@pytest.mark.filterwarnings("default")  # as the command line has it
def test_three_hundred_commands_end_in_an_exit_code_and_one_sentence(tmp_path):
    world = commands.World(tmp_path / "world", seed=1)
    cases = [commands.case_of(n, 1, tmp_path / "world", process=False) for n in range(300)]
    runs = [world.run(case, process=False) for case in cases]
    check(runs)
    assert {ran.code for ran in runs} == {0, 1, 2}
    assert {case.arguments[:1] for case in cases} >= {path[:1] for path in commands.commands()}


@pytest.mark.full
def test_two_thousand_processes_end_in_an_exit_code_and_one_sentence(tmp_path):
    def half(part):
        root = tmp_path / str(part)
        world = commands.World(root, seed=2)
        cases = [commands.case_of(n, 2, root, process=True) for n in range(part, 2000, 2)]
        return [world.run(case, process=True) for case in cases]

    with ThreadPoolExecutor(2) as pool:
        check([ran for runs in pool.map(half, range(2)) for ran in runs])


def test_every_command_and_option_is_tried():
    known = {
        (path, option.name) for path, options in commands.commands().items() for option in options
    }
    tried = set()
    for number in range(1500):
        case = commands.case_of(number, 1, commands.Path("/nowhere"), process=False)
        for path in commands.commands():
            if case.arguments[: len(path)] == path:
                tried |= {(path, each.partition("=")[0]) for each in case.arguments}
    missed = {each for each in known - tried if each[1].startswith("--")}
    assert not missed


# What it looks for is found where it is.


def judged(code, stderr):
    return commands._judged(commands.Case(1, ()), code, "", stderr, 0.1, "").faults


@pytest.mark.parametrize(
    ("code", "stderr", "fault"),
    [
        (0, "cn-clip: warning: x is left out\n", None),
        (2, "cn-clip: unknown model 'x'\n", None),
        (1, "", "without a word"),
        (3, "cn-clip: x\n", "exit code 3"),
        (
            1,
            'Traceback (most recent call last):\n  File "a/cn_clip/x.py", line 3\nKeyError: 1\n',
            "x.py:3",
        ),
        (1, "cn-clip: unexpected KeyError: 'x'; details in /tmp/x\n", "unexpected KeyError"),
        (1, f"cn-clip: {'x' * 301}\n", "301"),
    ],
)
def test_a_fault_is_reported(code, stderr, fault):
    faults = judged(code, stderr)
    assert (fault is None and not faults) or fault in " ".join(faults)


def test_a_changed_deleted_or_added_input_is_reported(tmp_path):
    world = commands.World(tmp_path / "world", seed=1)
    inputs = tmp_path / "world" / "inputs"
    case = commands.Case(1, ("x", f"{inputs}/new"))
    (inputs / "new").mkdir()  # which was asked for
    assert world._lost(case) == []
    (inputs / "more").write_text("x")
    (inputs / "csv" / "pairs.csv").unlink()
    assert [fault.partition(":")[0] for fault in world._lost(case)] == [
        "deleted an input",
        "left in the inputs",
    ]
