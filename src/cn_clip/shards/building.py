"""An index of embedding shards built: trained, its parts made in processes, merged and tuned.

What is done is kept: a run that was interrupted continues, and after new shards only these are
read. Parts can be made by any number of processes or machines that share the folder
(``EncodePart``); merging reads the parts alone.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.process_map import Workers, at_most, parallel_map
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.format_version import FIELD
from cn_clip.outputs import atomic_folder
from cn_clip.processes import usable_cpus
from cn_clip.publish import LOCK, map_write_errors
from cn_clip.search.ann import load_faiss, openmp_threads
from cn_clip.shards.encoding import (
    PARTS,
    Best,
    EncodePart,
    Part,
    PartPlan,
    best_of_parts,
    planned_parts,
)
from cn_clip.shards.folder import ShardFolder
from cn_clip.shards.index import INDEX, lists_folder
from cn_clip.shards.lists import ABOUT, FORMAT, LISTS, SHARDS, SIZES, Lists, digest_of, merge_parts
from cn_clip.shards.training import CodeName, Trained, train
from cn_clip.text import path_text
from cn_clip.translation import _

Array = npt.NDArray[Any]

COMMAND = "bulk index"
_CANDIDATES = [round(100 * 2 ** (step / 2)) for step in range(16)]  # 100 to 18,000
_TRAINED_AGAIN = 16  # times as many rows as when it was trained


@dataclass(frozen=True, slots=True)
class Built:
    """What was built.

    Attributes:
        rows: indexed.
        shards: indexed.
        lists: of the index.
        parts, encoded: of the index; how many of them were made now.
        probes, candidates: lists scanned, and rows scored exactly, for a query of 10 results.
        recall: of the 10 best rows of the texts it was tuned for.
        bytes: of the lists.
    """

    rows: int
    shards: int
    lists: int
    parts: int
    encoded: int
    probes: int
    candidates: int
    recall: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an index is built.

    Attributes:
        codes: ``int8`` takes D bytes for a row, ``int4`` half, ``pq`` a quarter; None for those of
            an index that is trained already, ``int4`` for a new one.
        recall: of the 10 best rows, that the sample of texts finds at least.
        lists: their number; by default twice the root of the number of rows.
        workers: that make the parts.
        retrain: whether to train again, which makes all parts anew.
    """

    codes: CodeName | None = None
    recall: float = 0.97
    lists: int | None = None
    workers: Workers = 0
    retrain: bool = False


def build_index(
    path: Path,
    queries: Callable[[], Array],
    options: Options | None = None,
    *,
    shards: range | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Built:
    """Build the index of a folder, or of a range of its shards, or bring it up to date.

    Args:
        path: of the folder; the index is in its subfolder ``index``.
        queries: returns unit vectors (Q, D) of texts such as will be searched for; a few hundred.
            Called only for training.
        options: how.
        shards: of them, for a server of a part; all ranges share one training.
        on_progress: called with the number of rows so far and in total.

    Raises:
        UsageError: there is no shard or no faiss, or another process builds this index, or it is
            trained with other codes or lists than are asked for.
        DataError: a shard is damaged, or a worker died.
        CNClipError: the disk is full or read-only.
    """
    options = options or Options()
    if load_faiss() is None:
        raise UsageError(_("an index needs faiss, on Linux: pip install faiss-cpu"))
    index = path / INDEX
    whole = ShardFolder.open(path)
    folder = whole if shards is None else ShardFolder.open(path, shards)
    with _locked(index):
        trained = _trained(whole, index, queries, options)
        plans = planned_parts(folder)
        encoded = _make_parts(EncodePart(folder, index), plans, trained, options, on_progress)
        return _merged(index, shards, plans, trained, options.recall, encoded)


def _trained(
    folder: ShardFolder, index: Path, queries: Callable[[], Array], options: Options
) -> Trained:
    rows = [len(folder.vectors(shard)) for shard in folder.numbers]
    trained = Trained.open(index)
    if trained is not None and not options.retrain and _fits(trained, folder.dim, sum(rows)):
        _check_options(trained, options)
        return trained
    codes = options.codes or ("int4" if trained is None else trained.codes)
    return train(folder, rows, index, queries(), codes=codes, lists=options.lists)


def _fits(trained: Trained, dim: int, rows: int) -> bool:
    return trained.index.d == dim and rows <= _TRAINED_AGAIN * trained.sampled_of


def _check_options(trained: Trained, options: Options) -> None:
    """Check that a trained index is what is asked for.

    Raises:
        UsageError: it has other codes, or other lists.
    """
    if options.codes not in (None, trained.codes):
        raise UsageError(
            _(
                "--codes is {codes}, and the index is trained with {stored}; leave out --codes, or "
                "build it anew with --retrain",
                codes=options.codes,
                stored=trained.codes,
            )
        )
    if options.lists not in (None, trained.index.nlist, trained.asked_lists):
        raise UsageError(
            _(
                "--lists is {lists}, and the index is trained with {stored:,}; leave out --lists, "
                "or build it anew with --retrain",
                lists=options.lists,
                stored=trained.index.nlist,
            )
        )


def _make_parts(
    encode: EncodePart,
    plans: list[PartPlan],
    trained: Trained,
    options: Options,
    on_progress: Callable[[int, int | None], None],
) -> int:
    """Make the parts that are missing; return their number."""
    total = sum(int(plan.shards[:, 1].sum()) for plan in plans)
    folder = encode.index / PARTS
    with map_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [plan for plan in plans if Part.open(folder, plan, trained) is None]
    done = total - sum(int(plan.shards[:, 1].sum()) for plan in missing)
    on_progress(done, total)
    with parallel_map(encode, at_most(options.workers, len(missing))) as run:
        for plan, _rows in zip(missing, run(missing), strict=True):
            done += int(plan.shards[:, 1].sum())
            on_progress(done, total)
    return len(missing)


def _merged(
    index: Path,
    shards: range | None,
    plans: list[PartPlan],
    trained: Trained,
    recall: float,
    encoded: int,
) -> Built:
    """Merge the parts into lists, tune them, and return what was built."""
    parts = [_opened_part(index / PARTS, plan, trained) for plan in plans]
    if not sum(len(part.rows) for part in parts):
        raise UsageError(_("{path} holds no vectors to index", path=path_text(index.parent)))
    best = best_of_parts(parts)
    indexed = np.concatenate([part.shards[:, :2] for part in parts])
    out = lists_folder(index, shards)
    about: dict[str, Any] = {FIELD: str(FORMAT), "trained": trained.digest}
    with map_write_errors(out), atomic_folder(out, COMMAND) as folder:
        sizes = merge_parts(parts, trained.index.code_size, folder / LISTS)
        np.save(folder / SIZES, sizes)
        np.save(folder / SHARDS, indexed)
        about |= {"digest": digest_of(sizes, indexed), "rows": int(sizes.sum())}
        (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        opened = Lists.open(folder, trained)
        assert opened is not None, "lists just written are valid"
        about |= _tuned(opened.index, trained, best, recall)
        (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        size = (folder / LISTS).stat().st_size
    return Built(
        rows=about["rows"],
        shards=len(indexed),
        lists=len(sizes),
        parts=len(parts),
        encoded=encoded,
        probes=about["probes"],
        candidates=about["candidates"],
        recall=about["recall"],
        bytes=size,
    )


def _opened_part(folder: Path, plan: PartPlan, trained: Trained) -> Part:
    part = Part.open(folder, plan, trained)
    if part is None:
        raise DataError(
            _(
                "part {name} of the index was changed or removed while it was built; build again",
                name=plan.name,
            )
        )
    return part


def _tuned(index: Any, trained: Trained, best: Best, recall: float) -> dict[str, Any]:
    """Choose how many lists are scanned, and how many rows are scored exactly, so that the texts
    find their best rows; return both, and the recall on these texts.

    Half of what may be missed may be missed by either.
    """
    faiss = load_faiss()
    assert faiss is not None
    order = index.quantizer.search(trained.queries, index.nlist)[1]  # (Q, L), nearest first
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(index.nlist)[None], axis=1)
    needed = np.take_along_axis(ranks, best.lists, axis=1)  # (Q, k): lists before it is found

    def share(hits: npt.NDArray[np.bool_]) -> float:
        """Return the share found, less two standard errors."""
        each = hits.mean(axis=1)
        return float(each.mean() - 2 * each.std() / math.sqrt(len(each)))

    goal = 1 - (1 - recall) / 2
    choices = range(1, index.nlist)
    at = bisect.bisect_left(choices, True, key=lambda n: share(needed < n) >= goal)
    probes = 1 + at if index.nlist > 1 else 1
    parameters = faiss.SearchParametersIVF(nprobe=probes)
    limit = min(_CANDIDATES[-1], index.ntotal)
    with openmp_threads(usable_cpus()):
        found = index.search(trained.queries, limit, params=parameters)[1]
    for candidates in _CANDIDATES:
        hits = np.stack([np.isin(b, f[:candidates]) for b, f in zip(best.ids, found, strict=True)])
        if share(hits) >= recall or candidates >= limit:
            break
    return {"probes": probes, "candidates": candidates, "recall": round(float(hits.mean()), 4)}


@contextmanager
def _locked(index: Path) -> Iterator[None]:
    """Hold the lock of an index.

    Raises:
        UsageError: another process has it.
    """
    from filelock import FileLock, Timeout

    with map_write_errors(index):
        index.mkdir(parents=True, exist_ok=True)
    lock = FileLock(index / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            _("another process builds {path}; wait until it is done", path=path_text(index))
        ) from None
    except OSError as error:
        raise CNClipError(
            _("{path} cannot be locked: {reason}", path=path_text(index), reason=error)
        ) from None
    try:
        yield
    finally:
        lock.release()
