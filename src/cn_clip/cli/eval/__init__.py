"""``cn-clip eval``: measure a model."""

from __future__ import annotations

from cyclopts import App

eval_app = App(name="eval", help="Measure a model, and tell what its scores mean.")
