"""The plan of a bulk run: which inputs each shard has, which model embeds them, and how.

A plan is three files of the output: ``plan_00000.json``, with everything that all shards share;
``plan_00000-DIGEST.inputs``, a line of JSON for each file of a source or each single image; and
``plan_00000-DIGEST.shards.npy``, one row per shard: where its lines are. A plan is never changed.
More inputs are another plan in the same place, whose shards are numbered on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip import __version__
from cn_clip.bulk.store import open_store
from cn_clip.bulk.store.base import WORK, Store
from cn_clip.config import BackendName, Precision
from cn_clip.errors import DataError, UsageError
from cn_clip.format_version import FIELD, Format
from cn_clip.translation import _

Embed = Literal["images", "texts", "both"]
Stored = Literal["float16", "float32"]

PLAN = Format("bulk-plan", 1)
OWN_NAME = re.compile(r"plan_\d{5,}(\.json|-[0-9a-f]{16}\.(inputs|shards\.npy))|about\.json")
LINE_KEY = np.dtype("S16")  # so wide that no two of 10^9 lines have the same digest
_BLOCK = 1 << 20  # bytes of the inputs read at a time
_HEAD = 4096  # bytes that hold the head of an array
OWN_FOLDERS = (WORK, "index", "img_emb", "text_emb", "metadata", "manifests", "quarantine")
# A row of the table of shards: bytes of its lines in the inputs, inputs of its first line that
# belong to earlier shards, inputs, and the digest of all this with the lines themselves.
ROW = np.dtype([
    ("start", "<u8"), ("stop", "<u8"), ("skip", "<u8"), ("count", "<u4"), ("key", "<u8")
])  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model of a plan: how to load it, and what it must be then."""

    model: str
    backend: BackendName
    device: str
    precision: Precision
    fast_decode: bool
    download_root: str | None
    name: str
    fingerprint: str
    dim: int
    logit_scale: float


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of a plan.

    Attributes:
        number: unique in the output.
        start, stop: bytes of its lines in the inputs.
        skip: inputs of the first line that belong to earlier shards.
        count: inputs.
        key: digest of the lines, ``skip`` and ``count``.
    """

    number: int
    start: int
    stop: int
    skip: int
    count: int
    key: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan without its inputs.

    Attributes:
        number: of the plan in its output.
        digest: of all inputs and of everything here.
        version: of this package.
        sources: URIs and paths, for people.
        embed: what is embedded of each input.
        stored: type of the numbers in the files.
        model: that embeds.
        shards_of: inputs of a shard; the last one of a plan may have fewer.
        first: number of the first shard.
        shards: how many it has.
        rows: inputs of all shards.
    """

    number: int
    digest: str
    version: str
    sources: tuple[str, ...]
    embed: Embed
    stored: Stored
    model: PlannedModel
    shards_of: int
    first: int
    shards: int
    rows: int

    @property
    def stem(self) -> str:
        """The start of the names of its files."""
        return f"plan_{self.number:05}-{self.digest}"

    @property
    def numbers(self) -> range:
        """The numbers of its shards."""
        return range(self.first, self.first + self.shards)

    def rows_of(self, number: int) -> int:
        """Return how many inputs a shard has."""
        return min(self.shards_of, self.rows - (number - self.first) * self.shards_of)

    def to_json(self) -> bytes:
        """Return the content of ``plan_00000.json``."""
        values = {FIELD: str(PLAN), **asdict(self)}
        return (json.dumps(values, indent=1) + "\n").encode()


def plan_name(number: int) -> str:
    """Return the name of the file of a plan."""
    return f"plan_{number:05}.json"


def read_plans(store: Store) -> list[Plan]:
    """Return the plans of an output, in order; none if there is no plan.

    Raises:
        DataError: a plan is damaged, or of a newer version.
    """
    plans: list[Plan] = []
    # Not by a listing: that of a bucket goes through everything below, too.
    while (content := store.read(name := plan_name(len(plans)))) is not None:
        plans.append(_parse(content, f"{store.name}/{name}"))
    return plans


def existing_plans(store: Store) -> list[Plan]:
    """Return the plans of an output that has at least one.

    Raises:
        UsageError: it has none.
        DataError: as ``read_plans``.
    """
    if plans := read_plans(store):
        return plans
    raise UsageError(
        _("{out} holds no plan; make one: cn-clip bulk plan SOURCE --out {out}", out=store.name)
    )


def _parse(content: bytes, where: str) -> Plan:
    try:
        values = json.loads(content)
        PLAN.check(values.pop(FIELD), where, DataError, _("make a plan in another place"))
        model = PlannedModel(**values.pop("model"))
        plan = Plan(model=model, **values | {"sources": tuple(values["sources"])})
        if plan.shards_of < 1 or plan.shards != -(-plan.rows // plan.shards_of):
            raise ValueError
        return plan
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            _("{path} is damaged; restore it, or plan again in another place", path=where)
        ) from None


def plan_of(plans: Sequence[Plan], number: int) -> Plan:
    """Return the plan that a shard is of.

    Raises:
        UsageError: no plan has such a shard.
    """
    for plan in plans:
        if number in plan.numbers:
            return plan
    raise UsageError(
        _("no shard {number}; there are {count:,}, from 0", number=number, count=shard_count(plans))
    )


def shard_count(plans: Sequence[Plan]) -> int:
    """Return how many shards several plans have."""
    return sum(plan.shards for plan in plans)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan in its place: gives its shards and their lines."""

    store: Store
    plan: Plan

    def shard(self, number: int) -> Shard:
        """Return a shard.

        Raises:
            DataError: the table of shards is missing or damaged.
        """
        (row,) = self.rows(number, number + 1)
        return Shard(number, *(int(row[name]) for name in ROW.names or ()))

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the rows ROW (N,) of some shards of the table, without reading the others.

        Raises:
            DataError: the table of shards is missing or damaged.
        """
        name = f"{self.plan.stem}.shards.npy"
        at = _start_of_table(self.store.location, self.plan)
        first, last = (at + (n - self.plan.first) * ROW.itemsize for n in (start, stop))
        content = self.store.read(name, first, last) or b""
        if len(content) != last - first:
            raise _damaged(self.store.name, name)
        return np.frombuffer(content, ROW)

    def lines(self, shard: Shard) -> list[bytes]:
        """Return the lines of a shard.

        Raises:
            DataError: the inputs are missing or damaged.
        """
        content = self.store.read(f"{self.plan.stem}.inputs", shard.start, shard.stop)
        lines = (content or b"").splitlines(keepends=True)
        if key_of(lines, shard.skip, shard.count) != shard.key:
            raise DataError(
                _(
                    "{path}: the lines of shard {number} are missing or damaged; restore the file",
                    path=f"{self.store.name}/{self.plan.stem}.inputs",
                    number=shard.number,
                )
            )
        return lines


@lru_cache(maxsize=64)
def _start_of_table(place: str, plan: Plan) -> int:
    """Return where the rows of the table of shards begin in its file."""
    store, name = open_store(place), f"{plan.stem}.shards.npy"
    stream = io.BytesIO(store.read(name, 0, _HEAD) or b"")
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError
        shape, _is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError, OSError):
        raise _damaged(store.name, name) from None
    if dtype != ROW or shape != (plan.shards,):
        raise _damaged(store.name, name)
    return stream.tell()


def _damaged(place: str, name: str) -> DataError:
    return DataError(_("{path} is missing or damaged; restore the file", path=f"{place}/{name}"))


def key_of(lines: Sequence[bytes], skip: int, count: int) -> int:
    """Return the digest of the inputs of a shard: a number below 2**64."""
    digest = hashlib.blake2b(f"{skip} {count}\n".encode(), digest_size=8)
    for line in lines:
        digest.update(line)
    return int.from_bytes(digest.digest(), "little")


def line_key(line: bytes) -> bytes:
    """Return the digest of one line of inputs, without zeros at its end: as numpy returns it."""
    return hashlib.blake2b(line, digest_size=LINE_KEY.itemsize).digest().rstrip(b"\0")


def known_lines(store: Store, plans: Sequence[Plan]) -> npt.NDArray[np.bytes_]:
    """Return the digests of all lines of the inputs of several plans, sorted.

    Raises:
        DataError: the inputs or the shards of a plan are missing or damaged.
    """
    keys = [
        np.fromiter((line_key(line) for line in _all_lines(store, plan)), LINE_KEY)
        for plan in plans
    ]
    return np.sort(np.concatenate([np.empty(0, LINE_KEY), *keys]))


def _all_lines(store: Store, plan: Plan) -> Iterator[bytes]:
    name, at, rest = f"{plan.stem}.inputs", 0, b""
    size = Planned(store, plan).shard(plan.numbers[-1]).stop
    while at < size:
        content = store.read(name, at, min(at + _BLOCK, size))
        if not content:
            raise _damaged(store.name, name)
        at += len(content)
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            yield line + b"\n"


def check_version(plan: Plan, where: str) -> None:
    """Raise a ``UsageError`` if a plan is of another version of this package."""
    if plan.version != __version__:
        raise UsageError(
            _(
                "{out} was planned with cn_clip {planned}, and this is {version}; install "
                "that version here: all shards must be of one",
                out=where,
                planned=plan.version,
                version=__version__,
            )
        )
