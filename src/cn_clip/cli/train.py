"""``cn-clip train``: train a model by a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UsageError
from cn_clip.processes import drop_dead_terminal
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.train.recipe.schema import Recipe
    from cn_clip.train.run.run_dir import Outcome

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


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
        _summary(outcome)
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
            _(
                "{recipe}: {model}, {parameters:,.1f} M parameters, {pairs:,} pairs, {device}, "
                "{processes} process(es)",
                recipe=event["recipe"],
                model=event["model"],
                parameters=event["parameters"] / 1e6,
                pairs=event["pairs"],
                device=event["device"],
                processes=event["processes"],
            )
        )
        yield from (f"  {line}" for line in event["origins"])
    elif kind == "warning":
        yield _("warning: {text}", text=event["text"])
    elif kind == "resumed":
        yield _("resumed from step {total:,}", total=total)
    elif kind == "stage":
        yield (
            _(
                "stage {stage}: {steps:,} steps of {batch:,} pairs, {trainable:,.1f} M trainable "
                "parameters, peak learning rate {lr:.2e} after {warmup:,} warm-up steps",
                stage=event["stage"],
                steps=event["steps"],
                batch=event["batch"],
                trainable=event["trainable"] / 1e6,
                lr=event["lr"],
                warmup=event["warmup"],
            )
            + (
                _(", BatchNorm statistics: {batch_norm}", batch_norm=event["batch_norm"])
                if event["batch_norm"]
                else ""
            )
        )
    elif kind == "step":
        yield (
            _(
                "  step {step:,}: loss {mean_loss}, lr {lr:.2e}, logit scale {logit_scale:.1f}, "
                "{pairs_per_second:,.0f} pairs/s",
                step=event["step"],
                mean_loss=_number(event["mean_loss"]),
                lr=event["lr"],
                logit_scale=event["logit_scale"],
                pairs_per_second=event["pairs_per_second"],
            )
            + (
                _(", {skipped:,} pairs skipped", skipped=event["skipped"])
                if event["skipped"]
                else ""
            )
        )
    elif kind == "mixtures":
        for row in event["mixtures"]:
            kept = "" if row["kept"] is None else _(", kept {kept:.2f} %", kept=100 * row["kept"])
            chosen = _(", chosen") if row["weight"] == event["weight"] else ""
            yield _(
                "  weight {weight:g}: {score:.2f} %{kept}{chosen}",
                weight=row["weight"],
                score=100 * row["score"],
                kept=kept,
                chosen=chosen,
            )
    elif kind == "score":
        when = _("before training") if total == 0 else _("at step {step:,}", step=event["step"])
        when = _("of the final weights") if event["stage"] == FINAL else when
        earlier = "".join(
            _(", {name} {recall:.2f} %", name=translate(name), recall=100 * event[name])
            for name in (N_("before"), N_("best"))
            if total and event[name] is not None
        )
        yield (
            _(
                "  mean recall {when}: {mean_recall:.2f} %{earlier} (text to image R@1 "
                "{t2i_r1:.1f}, R@10 {t2i_r10:.1f}; image to text R@1 {i2t_r1:.1f}, R@10 "
                "{i2t_r10:.1f})",
                when=when,
                mean_recall=100 * event["mean_recall"],
                earlier=earlier,
                t2i_r1=100 * event["t2i_r1"],
                t2i_r10=100 * event["t2i_r10"],
                i2t_r1=100 * event["i2t_r1"],
                i2t_r10=100 * event["i2t_r10"],
            )
        )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _summary(outcome: Any) -> None:
    out = console()
    if outcome.scores:
        table = Table("", _("mean recall"), _("gain"), box=None)
        first = outcome.scores[0][1]
        for name, value in outcome.scores:
            gain = "" if name == "before" else f"{100 * (value - first):+.2f}"
            table.add_row(translate(name), f"{100 * value:.2f} %", gain)
        out.print(table)
    out.print(
        _(
            "{steps:,} steps; weights in {weights}, report in {folder}/report.html",
            steps=outcome.steps,
            weights=outcome.weights,
            folder=outcome.folder,
        ),
        markup=False,
        soft_wrap=True,
    )


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
