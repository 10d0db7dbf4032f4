"""Run command lines from a grammar: ``python tests/fuzz/run_commands.py --count 300``.

The package that is imported is tested: set PYTHONPATH to the ``src`` of a worktree.
"""

from __future__ import annotations

import argparse
import collections
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz import commands


def main() -> int:
    """Parse the command line; return 1 if a command showed a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="this one alone, with what it prints")
    parser.add_argument("--processes", action="store_true", help="each as a process of its own")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--slow", action="store_true", help="print the slowest")
    given = parser.parse_args()
    numbers = list(range(given.first, given.first + given.count))
    if given.number is not None:
        numbers = [given.number]
    begin = time.monotonic()
    jobs = given.jobs if given.processes else 1
    with tempfile.TemporaryDirectory(prefix="cn-clip-fuzz-") as place:

        def some(job: int) -> list[commands.Ran]:
            root = Path(place) / str(job)
            world = commands.World(root, given.seed)
            found = []
            for number in numbers[job::jobs]:
                case = commands.case_of(number, given.seed, root, process=given.processes)
                found.append(world.run(case, process=given.processes))
                if len(found) % 50 == 0:
                    print(f"{len(found)} done by {job}", file=sys.stderr, flush=True)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            runs = (
                [each for many in pool.map(some, range(jobs)) for each in many]
                if given.processes
                else some(0)
            )
    if given.number is not None:
        print(shlex.join(map(ascii, runs[0].case.arguments)), runs[0].case, sep="\n")
        print(runs[0].stderr, runs[0].code, *runs[0].faults, sep="\n")
    print(
        f"{len(runs)} in {time.monotonic() - begin:.0f} s; exit codes",
        dict(collections.Counter(ran.code for ran in runs)),
        "faulty:",
        sum(bool(ran.faults) for ran in runs),
    )
    print(*commands.table(runs), sep="\n")
    if given.slow:
        for ran in sorted(runs, key=lambda ran: -ran.seconds)[:15]:
            print(f"{ran.seconds:6.1f} s", ascii(ran.case.arguments)[:200])
    return int(any(ran.faults for ran in runs))


if __name__ == "__main__":
    sys.exit(main())
