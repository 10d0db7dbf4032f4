"""``cn-clip bulk``: embeddings of many images in shards, and what is made of them."""

from __future__ import annotations

from cyclopts import App

bulk = App(name="bulk", help="Embed many images in shards, and search and curate them.")
# Each is imported when it is run, or its help is shown.
for _command in ("bulk_index:index", "bulk_curate:dedupe", "bulk_curate:filter"):
    bulk.command(f"cn_clip.cli.{_command}", name=_command.partition(":")[2])
