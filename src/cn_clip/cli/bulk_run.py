"""``cn-clip bulk plan``, ``run``, ``resume``, ``status`` and ``verify``: embeddings in shards."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.engines import EngineName, Share, check_local, cluster_of
from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import (
    Amount,
    Flag,
    Workers,
    console,
    duration,
    print_json,
    print_some,
    progress_bar,
)
from cn_clip.errors import UsageError
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.bulk.engines.base import Engine
    from cn_clip.bulk.plan import PlannedModel
    from cn_clip.bulk.run import Portion, Report
    from cn_clip.bulk.store.base import Store

_SHOWN = 20  # shards that are listed


@Parameter(name="*")
@dataclass(frozen=True)
class Running:
    """What runs the shards, and how.

    Parameters
    ----------
    engine
        local: processes of this machine. ray: a Ray cluster, or Ray on this machine.
    workers
        Processes, each with its own model. local: by default one per GPU, or per four CPUs; 0 uses
        the main process. ray: by default as many as there is room for.
    retries
        How often a failed shard is tried again.
    cpus
        Of each Ray worker.
    gpus
        Of each Ray worker; 0.25 shares a GPU among four.
    address
        Of the Ray cluster, by default RAY_ADDRESS.
    accept_missing
        Finish shards of which no input can be read, too.
    """

    engine: EngineName = "local"
    workers: Workers = None
    retries: Amount = 2
    cpus: Share = 1
    gpus: Share = 0
    address: str | None = None
    accept_missing: Flag = False

    def check(self) -> None:
        """Refuse options of another engine.

        Raises:
            UsageError: one is given.
        """
        if self.engine == "local":
            check_local(self.cpus, self.gpus, self.address)

    def opened(self) -> Engine:
        """Return the engine."""
        from cn_clip.bulk.engines.local import LocalEngine
        from cn_clip.bulk.engines.ray import RayEngine

        if self.engine == "local":
            return LocalEngine(self.workers)
        return RayEngine(cluster_of(self.workers, self.cpus, self.gpus, self.address))


DEFAULT_RUNNING = Running()


def plan(
    *sources: str,
    out: str,
    shards_of: int = 10_000,
    embed: Literal["images", "texts", "both"] = "images",
    store: Literal["float16", "float32"] = "float16",
    loading: Loading = DEFAULT,
    workers: Workers = None,
    json: Flag = False,
) -> int:
    """Fix which inputs each shard has, and the model that embeds them.

    Nothing is embedded yet: `cn-clip bulk run DEST` does that. A plan is never changed. The same
    command with more inputs, or with other sources, adds a plan of those that OUT does not have.

    Parameters
    ----------
    sources
        Images: folders (recursive), globs, image files, .txt and .jsonl lists. Pairs: KIND:PATH,
        with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; tar shards may be behind a URL.
    out
        DEST: a folder that all machines see at the same path, or a URL such as s3://bucket/name.
    shards_of
        Inputs of a shard, which is computed as a whole.
    embed
        What to embed: each image once, all texts of pairs, or both of each pair.
    store
        Type of the numbers in the files.
    workers
        Processes that load the model and index tar shards, by default one per CPU; 0 uses the main
        process.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.bulk.planning import Request, claim_output, describe, make_plan
    from cn_clip.bulk.store import open_store
    from cn_clip.data.process_map import parallel_map

    if not sources:
        raise UsageError(_("nothing to plan; give the sources after `cn-clip bulk plan`"))
    workers = usable_cpus() if workers is None else workers
    place = open_store(out)
    claim_output(place, sources, loading.paths)
    # In another process, so that this one stays small: torch and the model take 300 MB.
    with parallel_map(_planned_model, min(1, workers)) as describe_model:
        (model,) = describe_model([loading])
    request = Request(sources, embed, store, shards_of, model)
    with progress_bar(_("listing inputs")) as on_progress:
        made = make_plan(place, request, workers=workers, on_progress=on_progress)
    if json:
        print_json({"out": place.name, "plan": None if made is None else describe(made)})
    elif made is None:
        console().print(_("all inputs are in the plans of {out}", out=place.name), markup=False)
    else:
        console().print(
            _(
                "{rows:,} inputs in {shards:,} shards, for {model}; next: cn-clip bulk run {out}",
                rows=made.rows,
                shards=made.shards,
                model=made.model.name,
                out=place.name,
            ),
            markup=False,
        )
    return 0


def run(
    dest: str,
    /,
    *,
    part: str = "0/1",
    running: Running = DEFAULT_RUNNING,
    json: Flag = False,
) -> int:
    """Compute all shards that are not done.

    After an interruption, the same command goes on; done shards stay. Unreadable inputs are listed
    in the quarantine of their shard. The exit code is 1 if a shard failed.

    Parameters
    ----------
    dest
        The folder or URL of a plan.
    part
        INDEX/OF: compute only the shards whose number modulo OF is INDEX, as one job of an array.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.bulk.store import open_store

    running.check()
    return _run(open_store(dest), running, part, json)


def resume(
    dest: str,
    /,
    *,
    running: Running = DEFAULT_RUNNING,
    json: Flag = False,
) -> int:
    """Compute what `cn-clip bulk verify` finds missing or damaged.

    Parameters
    ----------
    dest
        The folder or URL of a plan.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.bulk.store import open_store
    from cn_clip.bulk.verify import verify as check

    running.check()
    store = open_store(dest)
    checked = check(store, discard=True)
    print_some(_damages(checked.damaged), _("cn-clip bulk verify lists them"))
    return _run(store, running, "0/1", json)


def status(dest: str, /, *, json: Flag = False) -> int:
    """Show how far a run is, also while it runs.

    Only manifests are read: files that are missing or damaged are found by `cn-clip bulk verify`.
    The exit code is 1 if shards have failed, or manifests are damaged.

    Parameters
    ----------
    dest
        The folder or URL of a plan.
    json
        Print JSON instead of a table.
    """
    from cn_clip.bulk.status import status_of
    from cn_clip.bulk.store import open_store

    store = open_store(dest)
    with progress_bar(_("reading manifests")) as on_progress:
        now = status_of(store, on_progress)
    if json:
        print_json({"out": store.name, **asdict(now), "seconds_left": now.seconds_left})
        return 1 if now.failures or now.damaged else 0
    left = now.seconds_left
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for label, value in (
        (_("shards done"), _("{done:,} of {total:,}", done=now.done, total=now.shards)),
        (_("running"), f"{now.running:,}"),
        (_("failed"), f"{now.failures:,}"),
        (_("damaged manifests"), f"{now.damaged:,}"),
        (_("embeddings"), _("{done:,} of {total:,}", done=now.rows_out, total=now.rows)),
        (_("quarantined"), f"{now.quarantined:,}"),
        (_("megabytes"), f"{now.bytes / 1e6:,.1f}"),
        (_("inputs per second"), f"{now.rate:,.1f}" if now.rate else _("unknown")),
        (_("time left"), _("unknown") if left is None else duration(left)),
    ):
        table.add_row(label, value)
    console().print(table, markup=False)
    print_some(_damages(now.failed)[:_SHOWN], _("--json lists more"))
    if now.damaged:
        message = _(
            "cn-clip: cn-clip bulk resume {out} computes damaged shards again", out=store.name
        )
        print(message, file=sys.stderr)
    return 1 if now.failures or now.damaged else 0


def verify(
    dest: str, /, *, checksums: Flag = False, discard: Flag = False, json: Flag = False
) -> int:
    """Check that every input is in a shard or in its quarantine, and every file as it was written.

    The exit code is 1 unless all shards are done and sound.

    Parameters
    ----------
    dest
        The folder or URL of a plan.
    checksums
        Read all files, and compare their checksums; otherwise their sizes are compared.
    discard
        Remove the manifests of damaged shards, so that `cn-clip bulk run` computes them again.
    json
        Print JSON instead of sentences.
    """
    from cn_clip.bulk.store import open_store
    from cn_clip.bulk.verify import verify as check

    store = open_store(dest)
    with progress_bar(_("checking shards")) as on_progress:
        found = check(store, checksums=checksums, discard=discard, on_read=on_progress)
    missing = sum(map(len, found.missing))
    if json:
        print_json(
            {
                "out": store.name,
                "complete": found.complete,
                "shards": found.shards,
                "done": found.done,
                "rows": found.rows,
                "rows_out": found.rows_out,
                "quarantined": found.quarantined,
                "missing": [[each.start, each.stop - 1] for each in found.missing],
                "damages": found.damages,
                "damaged": found.damaged,
                "leftovers": found.leftovers,
                "orphans": found.orphans,
                "discarded": found.discarded,
            }
        )
        return 0 if found.complete else 1
    print_some(_damages(found.damaged), _("--json lists more"))
    print_some(
        [_("{name} is of no shard", name=name) for name in found.orphans], _("--json lists more")
    )
    console().print(
        _(
            "{done:,} of {shards:,} shards are sound, with {rows_out:,} embeddings and "
            "{quarantined:,} inputs in quarantine, of {rows:,} inputs; {missing:,} shards are "
            "missing, {damages:,} damaged",
            done=found.done,
            shards=found.shards,
            rows_out=found.rows_out,
            quarantined=found.quarantined,
            rows=found.rows,
            missing=missing,
            damages=found.damages,
        ),
        markup=False,
    )
    return 0 if found.complete else 1


def _run(store: Store, running: Running, part: str, json: bool) -> int:
    from cn_clip.bulk.engines.base import Task
    from cn_clip.bulk.plan import existing_plans
    from cn_clip.bulk.run import run as run_plans

    device = existing_plans(store)[0].model.device
    task = Task(store.location, device, running.accept_missing, running.retries)
    start = time.perf_counter()
    with progress_bar(_("computing shards")) as on_progress:

        def show(report: Report) -> None:
            on_progress(report.earlier + report.done, report.shards)

        done = run_plans(store, running.opened(), task, portion=_portion(part), on_progress=show)
    seconds = time.perf_counter() - start
    print_some(_damages(done.failed), _("cn-clip bulk status --json lists more"))
    if json:
        print_json({"out": store.name, **asdict(done), "seconds": round(seconds, 3)})
    else:
        console().print(
            _(
                "{done:,} shards done, {earlier:,} were before, {failures:,} failed; {rows:,} "
                "embeddings, {quarantined:,} inputs in quarantine, {rate:,.1f} inputs per second",
                done=done.done,
                earlier=done.earlier,
                failures=done.failures,
                rows=done.rows,
                quarantined=done.quarantined,
                rate=(done.rows + done.quarantined) / seconds,
            ),
            markup=False,
        )
    if done.failures:
        print(_("cn-clip: the same command tries the failed shards again"), file=sys.stderr)
    return 1 if done.failures else 0


def _planned_model(loading: Loading) -> PlannedModel:
    """Load the model once, to write into the plan what it is."""
    import os

    from cn_clip.bulk.plan import PlannedModel

    embedder = loading.load()
    is_path = os.path.exists(loading.model)
    return PlannedModel(
        model=os.path.abspath(loading.model) if is_path else loading.model,
        backend=loading.backend,
        device=loading.device,
        precision=loading.precision,
        fast_decode=loading.fast_decode,
        download_root=None
        if loading.download_root is None
        else os.path.abspath(loading.download_root),
        name=embedder.name,
        fingerprint=embedder.fingerprint,
        dim=embedder.dim,
        logit_scale=embedder.logit_scale,
    )


def _portion(part: str) -> Portion:
    from cn_clip.bulk.run import Portion

    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    if match is None:
        raise UsageError(_("--part is {part!r}; give INDEX/OF, such as 0/100", part=part))
    return Portion(int(match[1]), int(match[2]))


def _damages(reasons: dict[int, str]) -> list[str]:
    return [
        _("shard {number}: {reason}", number=number, reason=reason)
        for number, reason in reasons.items()
    ]
