"""What ``cn-clip train`` prints of a run: a line or a few for each event, and a summary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from cn_clip.cli.show import console, duration
from cn_clip.train.run.events import FINAL, interpolated
from cn_clip.train.run.report import score_name
from cn_clip.translation import N_, _, translate

_LATEST = 0.3  # weight of the latest speed in the mean


class EventLines:
    """The lines of the events of a run."""

    def __init__(self) -> None:
        self._time_left = _TimeLeft()

    def of(self, event: dict[str, Any]) -> Iterator[str]:
        """Yield the lines of one event."""
        self._time_left.add(event)
        left = self._time_left.text() if event["kind"] == "step" else ""
        yield from _lines(event, left)


class _TimeLeft:
    """The time that a stage still needs, by the speed of its last steps.

    The first step, which warms up, does not count, nor does the time of evaluations.
    """

    def __init__(self) -> None:
        self._stage: dict[str, Any] = {}
        self._step: dict[str, Any] = {}
        self._speed = 0.0

    def add(self, event: dict[str, Any]) -> None:
        """Take an event into account."""
        if event["kind"] == "stage":
            self._stage, self._step, self._speed = event, {}, 0.0
        elif event["kind"] == "step":
            if self._step and event["pairs_per_second"] > 0:
                latest = event["pairs_per_second"]
                self._speed = (
                    latest if not self._speed else (1 - _LATEST) * self._speed + _LATEST * latest
                )
            self._step = event

    def text(self) -> str:
        """Return the time left for the line of a step; empty if it is unknown, or the end."""
        if not self._speed:
            return ""
        pairs = (self._stage["steps"] - self._step["step"]) * self._stage["batch"]
        if pairs <= 0:
            return ""
        return _(", {time} left", time=duration(pairs / self._speed))


def _lines(event: dict[str, Any], left: str) -> Iterator[str]:
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
            + left
        )
    elif kind == "mixtures":
        for row in event["mixtures"]:
            kept = "" if row["kept"] is None else _(", kept {kept:.2f} %", kept=100 * row["kept"])
            chosen = _(", chosen") if row["weight"] == event["weight"] else ""
            yield _(
                "  {weight:.0%} new weights: mean recall {score:.2f} %{kept}{chosen}",
                weight=row["weight"],
                score=100 * row["score"],
                kept=kept,
                chosen=chosen,
            )
    elif kind == "score":
        if event["stage"] == FINAL:
            when = _("of the final weights")
        elif total == 0:
            when = _("before training")
        elif event["stage"].endswith(interpolated("")):
            when = _("of the interpolated weights")
        else:
            when = _("at step {step:,}", step=event["step"])
        earlier = "".join(
            _(", {name} {recall:.2f} %", name=translate(name), recall=100 * event[key])
            for key, name in (("before", N_("before training")), ("best", N_("best before this")))
            if total and event[key] is not None
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


def print_summary(outcome: Any) -> None:
    """Print the scores of a run, and where its weights are."""
    out = console()
    if outcome.scores:
        table = Table("", box=None)
        for column in (_("mean recall"), _("gain")):
            table.add_column(column, justify="right")
        first = outcome.scores[0][1]
        for name, value in outcome.scores:
            gain = "" if name == "before" else f"{100 * (value - first):+.2f}"
            table.add_row(score_name(name), f"{100 * value:.2f} %", gain)
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
