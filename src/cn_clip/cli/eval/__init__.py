"""``cn-clip eval``: measure a model."""

from __future__ import annotations

from cyclopts import App

from cn_clip.cli.eval.diagnose import diagnose
from cn_clip.cli.eval.robustness import robustness

eval_app = App(name="eval", help="Measure a model, and tell what its scores mean.")
eval_app.command(robustness)
eval_app.command(diagnose)
