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
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.bench import BackendSpeed, BenchResult

_HEADINGS = (
    N_("backend"),
    N_("precision"),
    N_("images/s"),
    N_("of floor"),
    N_("texts/s"),
    N_("of floor"),
    N_("one image p50, p95"),
    N_("one text p50, p95"),
    N_("load"),
    N_("peak memory"),
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
        task = bar.add_task(_("measuring"), total=rounds)
        result = run(model, batch_size=batch_size, rounds=rounds, tick=lambda: bar.advance(task))
    if json:
        print_json(asdict(result) | {"noisy": result.is_noisy})
    else:
        _print(console(), result)


def _print(out: Console, result: BenchResult) -> None:
    out.print(
        _(
            "{model} on {processor}, {cpus} CPUs, batches of {batch_size}",
            model=result.model,
            processor=result.processor,
            cpus=result.cpus,
            batch_size=result.batch_size,
        ),
        markup=False,
    )
    table = Table(box=None, header_style="dim")
    for index, heading in enumerate(_HEADINGS):
        table.add_column(translate(heading), justify="left" if index < 2 else "right")
    for speed in result.backends:
        table.add_row(*_cells(speed))
    out.print(table)
    stages = Table(box=None, show_header=False)
    stages.add_column(style="dim")
    stages.add_column(justify="right")
    for stage in result.stages:
        stages.add_row(escape(translate(stage.name)), f"{stage.per_second:,.1f} /s")
    for floor in result.floors:
        stages.add_row(
            _("matrix product, {precision}", precision=floor.precision),
            f"{floor.gflops:,.0f} GFLOP/s ±{floor.spread:.0%}",
        )
    out.print(stages)
    for name, reason in result.skipped.items():
        out.print(_("not measured: {name}: {reason}", name=name, reason=reason), markup=False)
    if result.is_noisy:
        out.print(_("The machine is too noisy: the floor differs between runs by more than 5 %."))
    out.print(_line(result), markup=False)


def _cells(speed: BackendSpeed) -> list[str]:
    return [
        speed.backend,
        speed.precision,
        f"{speed.images_per_s:,.1f}",
        _percent(speed.image_share),
        f"{speed.texts_per_s:,.0f}",
        _percent(speed.text_share),
        _(
            "{image_m:.1f}, {speed_image_m:.1f} ms",
            image_m=speed.image_ms[0],
            speed_image_m=speed.image_ms[1],
        ),
        _(
            "{text_m:.1f}, {speed_text_m:.1f} ms",
            text_m=speed.text_ms[0],
            speed_text_m=speed.text_ms[1],
        ),
        f"{speed.load_seconds:.1f} s",
        f"{speed.peak_mb:,.0f} MB",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _line(result: BenchResult) -> str:
    """Return one line that people can paste: the fastest backend for images."""
    best = max(result.backends, key=lambda speed: speed.images_per_s)
    return _(
        "cn-clip {version} bench: {model}, {processor}, {cpus} CPUs: {images_per_s:,.1f} "
        "images/s, {texts_per_s:,.0f} texts/s, one text {text_m:.1f} ms ({backend} "
        "{precision}{value})",
        version=result.version,
        model=result.model,
        processor=result.processor,
        cpus=result.cpus,
        images_per_s=best.images_per_s,
        texts_per_s=best.texts_per_s,
        text_m=best.text_ms[0],
        backend=best.backend,
        precision=best.precision,
        value=_(", noisy machine") if result.is_noisy else "",
    )
