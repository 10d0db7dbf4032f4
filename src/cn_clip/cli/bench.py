"""``cn-clip bench``: the speed of this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json, progress

if TYPE_CHECKING:
    from cn_clip.bench import BackendSpeed, BenchResult

_HEADINGS = (
    "backend",
    "precision",
    "images/s",
    "of floor",
    "texts/s",
    "of floor",
    "one image p50, p95",
    "one text p50, p95",
    "load",
    "peak memory",
)
_Positive = Annotated[int, Parameter(validator=Number(gte=1, lte=4096))]


def bench(
    *,
    model: str = "mini",
    batch_size: _Positive = 8,
    rounds: _Positive = 5,
    json: Flag = False,
) -> None:
    """Measure this machine: preparation, both towers in every backend and precision, search.

    Backends are measured in turn, each in its own process: torch, and the runtimes of the exports
    that `cn-clip export --model MODEL` made without --out. The arithmetic floor is a plain matrix
    product of the model's sizes in the same run.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, the path of a checkpoint or of an export.
    batch_size
        Images per batch.
    rounds
        Measurements of each backend.
    json
        Print JSON instead of tables.
    """
    from cn_clip.bench import bench as run  # slow to import

    with progress() as bar:
        task = bar.add_task("measuring", total=rounds)
        result = run(model, batch_size=batch_size, rounds=rounds, tick=lambda: bar.advance(task))
    if json:
        print_json(asdict(result) | {"noisy": result.is_noisy})
    else:
        _print(console(), result)


def _print(out: Console, result: BenchResult) -> None:
    out.print(
        f"{result.model} on {result.processor}, {result.cpus} CPUs, batches of {result.batch_size}",
        markup=False,
    )
    table = Table(box=None, header_style="dim")
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for speed in result.backends:
        table.add_row(*_cells(speed))
    out.print(table)
    stages = Table(box=None, show_header=False)
    stages.add_column(style="dim")
    stages.add_column(justify="right")
    for stage in result.stages:
        stages.add_row(escape(stage.name), f"{stage.per_second:,.1f} /s")
    for floor in result.floors:
        stages.add_row(
            f"matrix product, {floor.precision}", f"{floor.gflops:,.0f} GFLOP/s ±{floor.spread:.0%}"
        )
    out.print(stages)
    for name, reason in result.skipped.items():
        out.print(f"not measured: {name}: {reason}", markup=False)
    if result.is_noisy:
        out.print("The machine is too noisy: the floor differs between runs by more than 5 %.")
    out.print(_line(result), markup=False)


def _cells(speed: BackendSpeed) -> list[str]:
    return [
        speed.backend,
        speed.precision,
        f"{speed.images_per_s:,.1f}",
        _percent(speed.image_share),
        f"{speed.texts_per_s:,.0f}",
        _percent(speed.text_share),
        f"{speed.image_ms[0]:.1f}, {speed.image_ms[1]:.1f} ms",
        f"{speed.text_ms[0]:.1f}, {speed.text_ms[1]:.1f} ms",
        f"{speed.load_seconds:.1f} s",
        f"{speed.peak_mb:,.0f} MB",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _line(result: BenchResult) -> str:
    """Return one line that people can paste: the fastest backend for images."""
    best = max(result.backends, key=lambda speed: speed.images_per_s)
    return (
        f"cn-clip {result.version} bench: {result.model}, {result.processor}, {result.cpus} CPUs: "
        f"{best.images_per_s:,.1f} images/s, {best.texts_per_s:,.0f} texts/s, one text "
        f"{best.text_ms[0]:.1f} ms ({best.backend} {best.precision}"
        f"{', noisy machine' if result.is_noisy else ''})"
    )
