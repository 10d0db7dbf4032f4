"""``cn-clip bulk``: embeddings of many images in shards, and what is made of them."""

from __future__ import annotations

from cyclopts import App

from cn_clip.cli.bulk_curate import dedupe, filter
from cn_clip.cli.bulk_index import index
from cn_clip.cli.bulk_run import plan, resume, run, status, verify

bulk = App(name="bulk", help="Embed many images in shards, and search and curate them.")
for _command in (plan, run, resume, status, verify, index, dedupe, filter):
    bulk.command(_command)
