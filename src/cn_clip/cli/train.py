"""``cn-clip train``: a recipe, carried out."""

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
    """Train a model by a recipe, in stages, as one run that can be stopped and resumed.

    Every option of a recipe is a flag too, by its full name or its last part, for one stage or for
    all: --stages.locked.epochs 3, --epochs 3, --learning-rate 1e-5, --global-batch-size 256. They
    are listed in docs/recipe.md. The official package's flags are understood: --train-data,
    --val-data, --lr, --batch-size, and so on. Several processes: torchrun --nproc-per-node 8 -m
    cn_clip train ...

    Exit code 130, 143 or 129: it was told to stop by Ctrl-C, SIGTERM or the end of its terminal,
    and has saved its state.

    Parameters
    ----------
    flags
        Options of the recipe.
    recipe
        The name of a shipped recipe, two-stage, finetune-muge, finetune-flickr30k-cn,
        finetune-coco-cn, finetune-small, distill or mini, or a TOML file.
    resume
        auto goes on with the run in --output.folder, if there is one. A checkpoint's path is what
        training starts from, as --start.checkpoint.
    allow_changes
        Go on with a run although the recipe has changed.
    show
        Print the recipe as it would be carried out, or the names of its model's parameters, and
        stop.
    json
        Print JSON instead of sentences.
    """
    from cn_clip.train.recipe.flags import apply_flags
    from cn_clip.train.recipe.toml import build_recipe, read_recipe, shipped

    if recipe is None:
        raise UsageError(
            f"which recipe? Give --recipe with a TOML file or one of: {', '.join(shipped())}"
        )
    given = list(flags)
    if resume not in (None, "auto"):
        given += ["--start.checkpoint", str(resume)]
    built = build_recipe(apply_flags(read_recipe(recipe), given, _world_size()))
    if show == "recipe":
        print(built.to_toml(), end="")
        return 0
    if show == "parameters":
        _show_parameters(built)
        return 0
    from dataclasses import asdict

    from cn_clip.train.loop import train as carry_out
    from cn_clip.train.run.loss_watchdog import InterruptedRun

    quiet = json or os.environ.get("RANK", "0") != "0"
    try:
        with _narrating(quiet) as tell:
            outcome = carry_out(
                built,
                resume=resume == "auto",
                allow_changes=allow_changes,
                inputs=[] if recipe in shipped() else [recipe],
                tell=tell,
            )
    except InterruptedRun as stopped:
        if os.environ.get("RANK", "0") == "0":
            Console(stderr=True).print(f"cn-clip: {stopped}", markup=False, soft_wrap=True)
        return stopped.code
    if json and os.environ.get("RANK", "0") == "0":
        print_json(asdict(outcome))
    elif not quiet:
        _summary(outcome)
    return 0


def _world_size() -> int:
    """Return the number of processes, which torchrun states."""
    stated = os.environ.get("WORLD_SIZE") or "1"
    if not stated.isdecimal() or int(stated) < 1:
        raise UsageError(f"WORLD_SIZE is {stated!r}; start several processes with torchrun")
    return int(stated)


@contextmanager
def _narrating(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what tells the events of a run to people: lines, and a bar under them."""
    if quiet:
        yield lambda event: None
        return
    with progress() as bars:
        tasks: dict[str, Any] = {}
        out = console() if bars.disable else bars.console

        def tell(event: dict[str, Any]) -> None:
            drop_dead_terminal()  # a run in the background outlives it
            if event["kind"] == "tick":
                what = event["what"]
                if what not in tasks:
                    for old in tasks.values():
                        bars.remove_task(old)
                    tasks.clear()
                    tasks[what] = bars.add_task(what, total=event["of"])
                bars.update(tasks[what], completed=event["done"])
                return
            for line in _lines(event):
                out.print(line, markup=False, highlight=False, soft_wrap=True)

        yield tell


def _lines(event: dict[str, Any]) -> Iterator[str]:
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
        yield f"going on from step {total:,}"
    elif kind == "stage":
        yield (
            f"stage {event['stage']}: {event['steps']:,} steps of {event['batch']:,} pairs, "
            f"{event['learns'] / 1e6:,.1f} M parameters learn, peak rate {event['rate']:.2e} at "
            f"this batch after {event['warmup']:,} steps"
            + (f", BatchNorm statistics: {event['batch_norm']}" if event["batch_norm"] else "")
        )
    elif kind == "step":
        yield (
            f"  step {event['step']:,}: loss {_number(event['mean_loss'])}, rate "
            f"{event['rate']:.2e}, logit scale {event['logit_scale']:.1f}, "
            f"{event['pairs_per_second']:,.0f} pairs/s"
            + (f", {event['skipped']:,} pairs skipped" if event["skipped"] else "")
        )
    elif kind == "mixtures":
        for each in event["mixtures"]:
            kept = "" if each["kept"] is None else f", kept {100 * each['kept']:.2f} %"
            chosen = ", chosen" if each["weight"] == event["weight"] else ""
            yield f"  mixture {each['weight']:g}: {100 * each['score']:.2f} %{kept}{chosen}"
    elif kind == "score":
        where = "before training" if total == 0 else f"at step {event['step']:,}"
        where = "of the final weights" if event["stage"] == "final" else where
        held = [(word, event[word]) for word in ("before", "best") if event[word] is not None]
        held = [(word, value) for word, value in held if total]
        best = "".join(f", {word} {100 * value:.2f} %" for word, value in held)
        yield (
            f"  mean recall {where}: {100 * event['mean_recall']:.2f} %{best} (text to image R@1 "
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
        f"{outcome.steps:,} steps; weights in {outcome.weights}, the whole story in "
        f"{outcome.folder}/report.html",
        markup=False,
        soft_wrap=True,
    )


def _show_parameters(recipe: Any) -> None:
    from cn_clip.train.model.init import initial_model

    model, _ = initial_model(recipe.start, recipe.seed)
    for name, parameter in model.named_parameters():
        print(f"{name} {list(parameter.shape)}")
