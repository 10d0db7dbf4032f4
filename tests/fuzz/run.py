"""Read damaged files, and print how they end: ``python tests/fuzz/run.py --format csv``.

The package that is imported is tested: set PYTHONPATH to the ``src`` of a worktree.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz import runner


def main() -> int:
    """Parse the command line; return 1 if a file ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", action="append", help="a name or pattern; by default all")
    parser.add_argument("--count", type=int, default=100, help="damaged files of each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="this one alone, here, with its traceback")
    parser.add_argument("--replay", type=Path, help="a saved folder, read here")
    parser.add_argument("--save", type=Path, help="where the files that end badly are copied to")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=10.0)
    parser.add_argument("--list", action="store_true", help="print the formats")
    given = parser.parse_args()
    if given.replay is not None:
        return _replay(given.replay)
    names = _names(given.format)
    if given.list:
        print(*names, sep="\n")
        return 0
    if given.number is not None:
        return _one(names[0], given.seed, given.number)
    jobs = [(name, given.seed, number) for number in range(given.count) for name in names]
    begin, found = time.monotonic(), []
    for each in runner.outcomes(
        jobs, workers=given.workers, deadline=given.deadline, save=given.save
    ):
        found.append(each)
        if len(found) % 500 == 0:
            bad = sum(one.kind not in runner.GOOD for one in found)
            print(f"{len(found)} of {len(jobs)}, {bad} bad", file=sys.stderr, flush=True)
    kinds = collections.Counter(each.kind for each in found)
    print(f"{len(found)} in {time.monotonic() - begin:.0f} s:", dict(kinds))
    for count, kind, what, where, listed in runner.table(found):
        print(f"{count:5} {kind:9} {what:28} {where:34} {listed}")
    return int(any(kind not in runner.GOOD for kind in kinds))


def _names(patterns: list[str] | None) -> list[str]:
    from fuzz.readers import FORMATS

    names = [n for n in FORMATS if any(fnmatch.fnmatch(n, p) for p in patterns or ["*"])]
    if not names:
        sys.exit(f"no format matches {patterns}; formats: {', '.join(FORMATS)}")
    return names


def _one(name: str, seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory() as place:
        found = runner.attempt(name, seed, number, Path(place) / "job", [])
        print(
            found.kind, found.what, found.where, f"{found.seconds:.1f} s", found.message, sep="\n"
        )
    return int(found.kind not in runner.GOOD)


def _replay(saved: Path) -> int:
    from fuzz.readers import FORMATS

    name = (saved / "format").read_text()
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "files"
        shutil.copytree(saved / "files", files, symlinks=True)
        kind, what, where, message = runner.judged(lambda: FORMATS[name].read(files))
    print(kind, what, where, message, sep="\n")
    return int(kind not in runner.GOOD)


if __name__ == "__main__":
    sys.exit(main())
