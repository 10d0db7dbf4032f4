"""``cn-clip eval``: evaluate a model."""

from __future__ import annotations

from cyclopts import App

from cn_clip.cli.eval.calibrate import calibrate
from cn_clip.cli.eval.diagnose import diagnose
from cn_clip.cli.eval.predictions import predictions
from cn_clip.cli.eval.protocol import protocol
from cn_clip.cli.eval.retrieval import retrieval
from cn_clip.cli.eval.robustness import robustness
from cn_clip.cli.eval.zeroshot import zeroshot

eval_app = App(name="eval", help="Evaluate a model, and calibrate its scores.")
eval_app.command(retrieval)
eval_app.command(zeroshot)
eval_app.command(protocol, name=["protocol", "--protocol"])  # also: eval --protocol NAME
eval_app.command(predictions)
eval_app.command(calibrate)
eval_app.command(robustness)
eval_app.command(diagnose)
