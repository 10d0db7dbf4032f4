"""``cn-clip train``: train a model by a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.cli.train_help import TrainHelp
from cn_clip.errors import UsageError
from cn_clip.processes import drop_dead_terminal
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.train.recipe.schema import Recipe
    from cn_clip.train.run.run_dir import Outcome

_SILENCE = 30.0  # seconds without a line, after which a log shows how far the run is

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


train_app = App(name="train", help_formatter=TrainHelp())


@train_app.default
def train(
    *flags: Flags,
    recipe: str | None = None,
    resume: str | None = None,
    allow_changes: Flag = False,
    show: Literal["recipe", "parameters", "cost"] | None = None,
    pairs: int | None = None,
    gpus: int = 1,
    tflops: float = 312.0,
    efficiency: float = 0.4,
    json: Flag = False,
) -> int:
    """Train a model by a recipe, in stages. A run can be interrupted and resumed.

    Example: cn-clip train --recipe finetune-small --train-data csv:train.csv
    --val-data csv:val.csv --output.folder run

    Every option of a recipe is also a flag, by its full name or its last part, for one stage or for
    all: --stages.locked.epochs 3, --epochs 3. The usual ones are below; --show recipe prints all.
    The official package's flags work too: --lr, --batch-size, --max-epochs, and so on. Several
    processes: torchrun --nproc-per-node 8 -m cn_clip train ...

    Exit codes 130, 143 and 129: the run was stopped by Ctrl-C, SIGTERM or the end of its terminal,
    and its state is saved.

    Parameters
    ----------
    flags
        Options of the recipe.
    recipe
        A shipped recipe, two-stage, finetune-muge, finetune-flickr30k-cn,
        finetune-coco-cn, finetune-small, distill or mini, or a TOML file.
    resume
        auto resumes the run in --output.folder, if there is one. The path of a checkpoint starts a
        new run from its weights, as --start.checkpoint does.
    allow_changes
        Resume a run although the recipe has changed.
    show
        Print the resulting recipe, the names of the model's parameters, or what the run costs
        (steps, operations, bytes, time), without training.
    pairs
        For --show cost: number of pairs, if the data is not here yet.
    gpus
        For --show cost: number of GPUs.
    tflops
        For --show cost: peak of one GPU, in 10^12 operations per second.
    efficiency
        For --show cost: fraction of the peak that is reached.
    json
        Print JSON instead of text.
    """
    from cn_clip.train.recipe.flags import apply_flags
    from cn_clip.train.recipe.toml import build_recipe, read_recipe, shipped

    if recipe is None:
        raise UsageError(
            _(
                "which recipe? Give --recipe with a TOML file or one of: {recipes}",
                recipes=", ".join(shipped()),
            )
        )
    all_flags = list(flags)
    if resume not in (None, "auto"):
        all_flags += ["--start.checkpoint", str(resume)]
    built = build_recipe(apply_flags(read_recipe(recipe), all_flags, processes()))
    if show == "recipe":
        print(built.to_toml(), end="")
        return 0
    if show == "parameters":
        _show_parameters(built)
        return 0
    if show == "cost":
        _show_cost(built, pairs, gpus, gpus * tflops * 1e12 * efficiency, json)
        return 0
    return run_training(
        built,
        resume=resume == "auto",
        allow_changes=allow_changes,
        inputs=[] if recipe in shipped() else [recipe],
        json=json,
    )


def run_training(
    recipe: Recipe,
    *,
    resume: bool,
    allow_changes: bool = False,
    inputs: Sequence[str] = (),
    json: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> int:
    """Train and print what happens; return the exit code.

    ``on_outcome`` is called in the main process at the end of the run.
    """
    from dataclasses import asdict

    from cn_clip.cli.train_events import print_summary
    from cn_clip.train.loop import train as run_recipe
    from cn_clip.train.run.signals import InterruptedRun

    is_main = os.environ.get("RANK", "0") == "0"
    quiet = json or not is_main
    try:
        with _event_printer(quiet) as on_event:
            outcome = run_recipe(
                recipe,
                resume=resume,
                allow_changes=allow_changes,
                inputs=inputs,
                on_event=on_event,
            )
    except InterruptedRun as error:
        if is_main:
            Console(stderr=True).print(f"cn-clip: {error}", markup=False, soft_wrap=True)
        return error.code
    if is_main:
        on_outcome(outcome)
    if json and is_main:
        print_json(asdict(outcome))
    elif not quiet:
        print_summary(outcome)
    return 0


def processes() -> int:
    """Return the number of processes, from torchrun's WORLD_SIZE."""
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(
            _("WORLD_SIZE is {value!r}; start several processes with torchrun", value=value)
        )
    return int(value)


@contextmanager
def _event_printer(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that prints the events of a run, with a progress bar below.

    Without a terminal there is no bar: a line now and then says how far the run is.
    """
    if quiet:
        yield lambda event: None
        return
    from cn_clip.cli.train_events import EventLines

    with progress() as bars:
        tasks: dict[str, Any] = {}
        lines = EventLines()
        out = console() if bars.disable else bars.console
        printed = time.monotonic()

        def print_line(line: str) -> None:
            nonlocal printed
            printed = time.monotonic()
            out.print(line, markup=False, highlight=False, soft_wrap=True)

        def print_event(event: dict[str, Any]) -> None:
            drop_dead_terminal()  # a background run outlives its terminal
            if event["kind"] == "tick" and bars.disable:
                if time.monotonic() - printed >= _SILENCE:
                    what, done, of = event["what"], event["done"], event["of"]
                    print_line(_("  {what}: {done:,} of {of:,}", what=what, done=done, of=of))
            elif event["kind"] == "tick":
                label = event["what"]
                if label not in tasks:
                    for task in tasks.values():
                        bars.remove_task(task)
                    tasks.clear()
                    tasks[label] = bars.add_task(label, total=event["of"])
                bars.update(tasks[label], completed=event["done"])
            else:
                for line in lines.of(event):
                    print_line(line)

        yield print_event


def _show_cost(
    recipe: Any, pairs: int | None, gpus: int, flops_per_second: float, json: bool
) -> None:
    from dataclasses import asdict

    from cn_clip.data.sources.open import open_mix
    from cn_clip.processes import usable_cpus
    from cn_clip.train.cost import DataSize, data_size, run_cost

    if flops_per_second <= 0:
        raise UsageError(_("--gpus, --tflops and --efficiency must be above zero"))
    if pairs is not None:
        data = DataSize(pairs, pairs)
    else:
        data = data_size(open_mix(recipe.data.train, workers=usable_cpus()))
    cost = run_cost(recipe, data, world_size=gpus)
    seconds = [stage.seconds(flops_per_second) for stage in cost.stages]
    if json:
        print_json(asdict(cost) | {"seconds": seconds})
        return
    print(
        _(
            "{model}, {parameters:.1f} M parameters; {pairs:,} pairs, at most {images:,} images; "
            "forwards {image:.1f} GFLOPs for an image, {text:.1f} for {tokens} tokens",
            model=cost.model,
            parameters=cost.parameters / 1e6,
            pairs=data.pairs,
            images=data.images,
            image=cost.image_flops / 1e9,
            text=cost.text_flops / 1e9,
            tokens=cost.tokens,
        )
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", *(stage.name for stage in cost.stages)):
        table.add_column(column, justify="right" if column else "left")
    unknown = _("unknown")
    rows = {
        _("steps"): [f"{stage.steps:,}" for stage in cost.stages],
        _("pairs in a step"): [f"{stage.batch:,}" for stage in cost.stages],
        _("operations"): [f"{stage.flops:.3g}" for stage in cost.stages],
        _("operations of cached features"): [f"{s.feature_flops:.3g}" for s in cost.stages],
        _("images read, GB"): [
            unknown if stage.image_bytes is None else f"{stage.image_bytes / 1e9:,.1f}"
            for stage in cost.stages
        ],
        _("cached features, GB"): [f"{stage.cache_bytes / 1e9:,.1f}" for stage in cost.stages],
        _("memory without activations, GB"): [
            f"{stage.memory_bytes / 1e9:,.1f}" for stage in cost.stages
        ],
        _("a saved state, GB"): [f"{stage.state_bytes / 1e9:,.1f}" for stage in cost.stages],
        _("days on {gpus:,} GPUs", gpus=gpus): [f"{each / 86400:,.2f}" for each in seconds],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console().print(table)


def _show_parameters(recipe: Any) -> None:
    from cn_clip.train.model.init import initial_model

    model, _ = initial_model(recipe.start, recipe.seed)
    for name, parameter in model.named_parameters():
        print(f"{name} {list(parameter.shape)}")
