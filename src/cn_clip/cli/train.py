"""``cn-clip train``: train a model by a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UsageError
from cn_clip.processes import drop_dead_terminal

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def train(
    *flags: Flags,
    recipe: str | None = None,
    resume: str | None = None,
    allow_changes: Flag = False,
    show: Literal["recipe", "parameters"] | None = None,
    json: Flag = False,
) -> int:
    """Train a model by a recipe, in stages. A run can be interrupted and resumed.

    Every option of a recipe is also a flag, by its full name or its last part, for one stage or for
    all: --stages.locked.epochs 3, --epochs 3, --learning-rate 1e-5, --global-batch-size 256; see
    docs/recipe.md. The official package's flags work too: --train-data, --val-data, --lr,
    --batch-size, and so on. Several processes: torchrun --nproc-per-node 8 -m cn_clip train ...

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
        Print the resulting recipe, or the names of the model's parameters, without training.
    json
        Print JSON instead of text.
    """
    from cn_clip.train.recipe.flags import apply_flags
    from cn_clip.train.recipe.toml import build_recipe, read_recipe, shipped

    if recipe is None:
        raise UsageError(
            f"which recipe? Give --recipe with a TOML file or one of: {', '.join(shipped())}"
        )
    all_flags = list(flags)
    if resume not in (None, "auto"):
        all_flags += ["--start.checkpoint", str(resume)]
    built = build_recipe(apply_flags(read_recipe(recipe), all_flags, _world_size()))
    if show == "recipe":
        print(built.to_toml(), end="")
        return 0
    if show == "parameters":
        _show_parameters(built)
        return 0
    from dataclasses import asdict

    from cn_clip.train.loop import train as run_recipe
    from cn_clip.train.run.signals import InterruptedRun

    quiet = json or os.environ.get("RANK", "0") != "0"
    try:
        with _event_printer(quiet) as on_event:
            outcome = run_recipe(
                built,
                resume=resume == "auto",
                allow_changes=allow_changes,
                inputs=[] if recipe in shipped() else [recipe],
                on_event=on_event,
            )
    except InterruptedRun as error:
        if os.environ.get("RANK", "0") == "0":
            Console(stderr=True).print(f"cn-clip: {error}", markup=False, soft_wrap=True)
        return error.code
    if json and os.environ.get("RANK", "0") == "0":
        print_json(asdict(outcome))
    elif not quiet:
        _summary(outcome)
    return 0


def _world_size() -> int:
    """Return the number of processes, from torchrun's WORLD_SIZE."""
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"WORLD_SIZE is {value!r}; start several processes with torchrun")
    return int(value)


@contextmanager
def _event_printer(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that prints the events of a run, with a progress bar below."""
    if quiet:
        yield lambda event: None
        return
    with progress() as bars:
        tasks: dict[str, Any] = {}
        out = console() if bars.disable else bars.console

        def print_event(event: dict[str, Any]) -> None:
            drop_dead_terminal()  # a background run outlives its terminal
            if event["kind"] == "tick":
                label = event["what"]
                if label not in tasks:
                    for task in tasks.values():
                        bars.remove_task(task)
                    tasks.clear()
                    tasks[label] = bars.add_task(label, total=event["of"])
                bars.update(tasks[label], completed=event["done"])
                return
            for line in _lines(event):
                out.print(line, markup=False, highlight=False, soft_wrap=True)

        yield print_event


def _lines(event: dict[str, Any]) -> Iterator[str]:
    from cn_clip.train.run.events import FINAL

    kind, total = event["kind"], event["total"]
    if kind == "start":
        yield (
            f"{event['recipe']}: {event['model']}, {event['parameters'] / 1e6:,.1f} M parameters, "
            f"{event['pairs']:,} pairs, {event['device']}, {event['processes']} process(es)"
        )
        yield from (f"  {line}" for line in event["origins"])
    elif kind == "warning":
        yield f"warning: {event['text']}"
    elif kind == "resumed":
        yield f"resumed from step {total:,}"
    elif kind == "stage":
        yield (
            f"stage {event['stage']}: {event['steps']:,} steps of {event['batch']:,} pairs, "
            f"{event['trainable'] / 1e6:,.1f} M trainable parameters, peak learning rate "
            f"{event['lr']:.2e} after {event['warmup']:,} warm-up steps"
            + (f", BatchNorm statistics: {event['batch_norm']}" if event["batch_norm"] else "")
        )
    elif kind == "step":
        yield (
            f"  step {event['step']:,}: loss {_number(event['mean_loss'])}, lr "
            f"{event['lr']:.2e}, logit scale {event['logit_scale']:.1f}, "
            f"{event['pairs_per_second']:,.0f} pairs/s"
            + (f", {event['skipped']:,} pairs skipped" if event["skipped"] else "")
        )
    elif kind == "mixtures":
        for row in event["mixtures"]:
            kept = "" if row["kept"] is None else f", kept {100 * row['kept']:.2f} %"
            chosen = ", chosen" if row["weight"] == event["weight"] else ""
            yield f"  weight {row['weight']:g}: {100 * row['score']:.2f} %{kept}{chosen}"
    elif kind == "score":
        when = "before training" if total == 0 else f"at step {event['step']:,}"
        when = "of the final weights" if event["stage"] == FINAL else when
        earlier = "".join(
            f", {name} {100 * event[name]:.2f} %"
            for name in ("before", "best")
            if total and event[name] is not None
        )
        yield (
            f"  mean recall {when}: {100 * event['mean_recall']:.2f} %{earlier} (text to image R@1 "
            f"{100 * event['t2i_r1']:.1f}, R@10 {100 * event['t2i_r10']:.1f}; image to text R@1 "
            f"{100 * event['i2t_r1']:.1f}, R@10 {100 * event['i2t_r10']:.1f})"
        )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _summary(outcome: Any) -> None:
    out = console()
    if outcome.scores:
        table = Table("", "mean recall", "gain", box=None)
        first = outcome.scores[0][1]
        for name, value in outcome.scores:
            gain = "" if name == "before" else f"{100 * (value - first):+.2f}"
            table.add_row(name, f"{100 * value:.2f} %", gain)
        out.print(table)
    out.print(
        f"{outcome.steps:,} steps; weights in {outcome.weights}, report in "
        f"{outcome.folder}/report.html",
        markup=False,
        soft_wrap=True,
    )


def _show_parameters(recipe: Any) -> None:
    from cn_clip.train.model.init import initial_model

    model, _ = initial_model(recipe.start, recipe.seed)
    for name, parameter in model.named_parameters():
        print(f"{name} {list(parameter.shape)}")
