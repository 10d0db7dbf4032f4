"""``cn-clip eval``: measure a model."""

from __future__ import annotations

from cyclopts import App

from cn_clip.cli.eval.calibrate import calibrate
from cn_clip.cli.eval.zeroshot import zeroshot

eval_app = App(name="eval", help="Measure a model, and tell what its scores mean.")
eval_app.command(calibrate)
eval_app.command(zeroshot)
