"""A plan is made: the inputs are listed once, cut into shards, and written before the plan."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip import __version__
from cn_clip.bulk.inputs import Line, is_pairs, list_lines
from cn_clip.bulk.plan import (
    LINE_KEY,
    OWN_FOLDERS,
    OWN_NAME,
    ROW,
    Embed,
    Plan,
    PlannedModel,
    Stored,
    key_of,
    known_lines,
    line_key,
    plan_name,
    read_plans,
    shard_count,
)
from cn_clip.bulk.store.base import WORK, Store
from cn_clip.bulk.store.folder import FolderStore
from cn_clip.data.process_map import Progress, no_progress
from cn_clip.data.sources.open import absolute_uri, paths_of
from cn_clip.embeddings.files import with_format
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.outputs import claim
from cn_clip.publish import map_write_errors
from cn_clip.text import path_text
from cn_clip.translation import _

_ABOUT = "about.json"
_MAX_SHARD = 1_000_000  # inputs: the vectors of a shard are in memory
_OFTEN = 1000  # images between two calls of ``on_progress``
_NEW = "planning"  # folder of an unfinished plan


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan.

    Attributes:
        sources: URIs, folders, globs and lists of images.
        embed: what to embed of each input.
        stored: type of the numbers in the files.
        shards_of: inputs of a shard.
        model: that embeds, its fingerprint included.
    """

    sources: tuple[str, ...]
    embed: Embed
    stored: Stored
    shards_of: int
    model: PlannedModel


def claim_output(out: Store, sources: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Check that plans and shards may be written to an output, without touching it.

    Raises:
        UsageError: it holds other files, or is an input; a bucket is not checked.
    """
    if not isinstance(out, FolderStore):
        return
    files = [path for given in sources for path in (paths_of(given) if is_pairs(given) else ())]
    images = [given for given in sources if not is_pairs(given)]
    claim(out.root, _check_own, kind="folder", inputs=[*files, *images, *inputs], in_place=True)


def _check_own(folder: Path) -> str | None:
    # Only the names at the top, as there may be millions below.
    names = sorted(os.listdir(folder))
    other = next((n for n in names if n not in OWN_FOLDERS and not OWN_NAME.fullmatch(n)), None)
    if other is not None:
        return _("holds {other}, not written by {command}", other=other, command="bulk")
    if any(name in OWN_FOLDERS and name != WORK for name in names) and _ABOUT not in names:
        return _("holds embeddings, and no plan")
    return None


def make_plan(
    out: Store, request: Request, *, workers: int = 0, on_progress: Progress = no_progress
) -> Plan | None:
    """List the inputs of the sources that no plan of the output has, and write a plan of them.

    Args:
        out: from ``open_store``, see ``claim_output``.
        request: what to plan.
        workers: processes that index tar shards; 0 indexes in this process.
        on_progress: called with the number of inputs so far.

    Returns:
        The plan; None if all inputs are planned already.

    Raises:
        UsageError: a source is invalid; or the output has plans of another model, or of other
            options.
        DataError: a source does not exist, or an input is listed twice.
        CNClipError: another process plans, or the output is full.
    """
    if not 1 <= request.shards_of <= _MAX_SHARD:
        raise UsageError(
            _(
                "{count:,} inputs per shard; give 1 to {limit:,}",
                count=request.shards_of,
                limit=_MAX_SHARD,
            )
        )
    request = replace(request, sources=tuple(map(_absolute, request.sources)))
    with map_write_errors(out.name), out.working(_NEW) as folder:
        plans = read_plans(out)
        if plans:
            _check_same(plans[0], request, out.name)
        writer = _Writer(folder, request.shards_of, known_lines(out, plans))
        with writer.path.open("wb") as stream:
            for given in request.sources:
                for line in list_lines(given, request.embed, workers=workers):
                    writer.add(line, stream)
                    if line.inputs > 1 or not writer.rows % _OFTEN:
                        on_progress(writer.rows, None)
        writer.finish()
        if not writer.rows:
            return None
        plan = Plan(
            number=len(plans),
            digest="",
            version=__version__,
            sources=request.sources,
            embed=request.embed,
            stored=request.stored,
            model=request.model,
            shards_of=request.shards_of,
            first=shard_count(plans),
            shards=len(writer.starts),
            rows=writer.rows,
        )
        plan = replace(plan, digest=_digest(plan, writer))
        _publish(out, plan, writer, folder)
        return plan


def _publish(out: Store, plan: Plan, writer: _Writer, folder: Path) -> None:
    """Write the files of a plan, itself last."""
    table = folder / "shards.npy"
    np.save(table, writer.table())
    out.publish(f"{plan.stem}.inputs", writer.path)
    out.publish(f"{plan.stem}.shards.npy", table)
    out.create(_ABOUT, _about(plan))
    out.settle("")
    if not out.create(plan_name(plan.number), plan.to_json()):
        raise CNClipError(
            _("another process made a plan in {out} meanwhile; run this again", out=out.name)
        )


class _Writer:
    """Cuts lines into shards, and writes them to a file; 36 bytes of memory per shard, and 16 per
    line."""

    def __init__(self, folder: Path, shards_of: int, known: npt.NDArray[np.bytes_]) -> None:
        self.path = folder / "inputs"
        self.rows = 0
        self.starts, self.stops, self.skips = array("Q"), array("Q"), array("Q")
        self.counts, self.keys = array("I"), array("Q")
        self._size, self._known = shards_of, known
        self._line_keys = bytearray()
        self._at = 0  # bytes written
        self._lines: list[bytes] = []  # of the open shard
        self._start = self._skip = self._count = 0  # of the open shard

    def add(self, line: Line, stream: BinaryIO) -> None:
        """Write a line, unless another plan has it."""
        key = line_key(line.text)
        at = int(np.searchsorted(self._known, np.bytes_(key)))
        if not line.inputs or (at < len(self._known) and self._known[at] == key):
            return
        self._line_keys += key.ljust(LINE_KEY.itemsize, b"\0")
        stream.write(line.text)
        taken = 0
        while taken < line.inputs:
            if not self._count:
                self._start, self._skip, self._lines = self._at, taken, []
            if not self._lines or self._lines[-1] is not line.text:
                self._lines.append(line.text)
            now = min(line.inputs - taken, self._size - self._count)
            self._count, taken = self._count + now, taken + now
            if self._count == self._size:
                self._close(self._at + len(line.text))
        self._at += len(line.text)
        self.rows += line.inputs

    def finish(self) -> None:
        """End the last shard.

        Raises:
            DataError: an input is listed twice.
        """
        if self._count:
            self._close(self._at)
        keys = np.frombuffer(self._line_keys, LINE_KEY)
        ordered = np.sort(keys)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            label = self._label(int(np.flatnonzero(keys == twice[0])[0]))
            raise DataError(_("{label} is listed twice; give it once", label=label))

    def _label(self, number: int) -> str:
        """Return what a line has of an input: the path of an image, or a file of pairs."""
        with self.path.open("rb") as stream:
            values = json.loads(next(islice(stream, number, None)))
        return path_text(values[1] if isinstance(values, list) else values["path"])

    def table(self) -> npt.NDArray[np.void]:
        """Return the rows of all shards."""
        table = np.zeros(len(self.starts), ROW)
        columns = (self.starts, self.stops, self.skips, self.counts, self.keys)
        for name, column in zip(ROW.names or (), columns, strict=True):
            table[name] = np.array(column, np.uint64)
        return table

    def _close(self, stop: int) -> None:
        self.starts.append(self._start)
        self.stops.append(stop)
        self.skips.append(self._skip)
        self.counts.append(self._count)
        self.keys.append(key_of(self._lines, self._skip, self._count))
        self._count = 0


def _absolute(given: str) -> str:
    if is_pairs(given):
        return absolute_uri(given)
    return os.path.abspath(os.path.expanduser(given))


def _digest(plan: Plan, writer: _Writer) -> str:
    digest = hashlib.blake2b(plan.to_json(), digest_size=8)
    digest.update(writer.keys.tobytes())
    return digest.hexdigest()


def _about(plan: Plan) -> bytes:
    """Return the metadata that ``cn-clip embed`` writes beside embeddings."""
    model = plan.model
    about = {
        "model": model.model if os.path.exists(model.model) else model.name,
        "fingerprint": model.fingerprint,
        "kind": "texts" if plan.embed == "texts" else "images",
        "dim": model.dim,
        "normalized": True,
        "logit_scale": model.logit_scale,
    }
    return (json.dumps(with_format(about), ensure_ascii=False, indent=2) + "\n").encode()


def _check_same(first: Plan, request: Request, out: str) -> None:
    """Check that new shards would be like those of the first plan.

    Raises:
        UsageError: they would differ.
    """
    for name in ("embed", "stored"):
        if getattr(first, name) != getattr(request, name):
            raise UsageError(
                _(
                    "the plans of {out} have {name} {old}, and this one {new}; give the same, or "
                    "another place",
                    out=out,
                    name={"embed": "--embed", "stored": "--store"}[name],
                    old=getattr(first, name),
                    new=getattr(request, name),
                )
            )
    if first.model.fingerprint != request.model.fingerprint:
        raise UsageError(
            _(
                "{out} was planned with {old}, and {new} is another model, precision or runtime; "
                "give the same, or another place",
                out=out,
                old=f"{first.model.name} ({first.model.fingerprint})",
                new=f"{request.model.name} ({request.model.fingerprint})",
            )
        )
    if first.version != __version__:
        raise UsageError(
            _(
                "{out} was planned with cn_clip {planned}, and this is {version}; give another "
                "place",
                out=out,
                planned=first.version,
                version=__version__,
            )
        )


def describe(plan: Plan) -> dict[str, object]:
    """Return what a plan is, for ``--json``."""
    values = asdict(plan)
    return values | {"sources": list(plan.sources)}
