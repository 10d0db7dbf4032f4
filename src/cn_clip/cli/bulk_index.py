"""``cn-clip bulk index``: an index over embedding shards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from cn_clip.cli.engines import DEFAULT_ENGINE, Engine
from cn_clip.cli.library_options import DEFAULT, LibraryLoading
from cn_clip.cli.show import Flag, print_json, progress_bar
from cn_clip.translation import _

Recall = Annotated[float, Parameter(validator=Number(gt=0, lt=1))]
Count = Annotated[int | None, Parameter(validator=Number(gte=1, lte=1 << 22))]


def index(
    folder: str,
    /,
    *,
    codes: Literal["int8", "int4", "pq"] | None = None,
    recall: Recall = 0.97,
    lists: Count = None,
    shards: str | None = None,
    retrain: Flag = False,
    engine: Engine = DEFAULT_ENGINE,
    loading: LibraryLoading = DEFAULT,
    json: Flag = False,
) -> int:
    """Build an index over embedding shards, or bring it up to date.

    `cn-clip search --library FOLDER` and `cn-clip serve --library FOLDER` use it. It is written to
    the subfolder index, which may be deleted at any time. After an interruption, the same command
    resumes; new shards are added to it without reading the others.

    Parameters
    ----------
    folder
        Embedding shards, as `cn-clip bulk` or `cn-clip embed images` wrote them.
    codes
        What is stored of a vector: int8 takes a byte for each value, int4 half of it, pq a quarter.
        Smaller codes need more rows scored exactly. By default int4, or what the index has; other
        codes need --retrain.
    recall
        Share of the 10 best images that searches find at least, on texts of the index run.
    lists
        Number of lists; by default twice the square root of the number of images. Another number
        than the index has needs --retrain.
    shards
        Only these, for a server of a part: the first, and the one after the last, such as 0:250.
        All parts share one training.
    retrain
        Train again, on the shards as they are now, and build everything anew.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.files import as_path
    from cn_clip.search.confidence import background_words
    from cn_clip.shards.building import Options, build_index
    from cn_clip.shards.folder import parse_range
    from cn_clip.shards.library import ShardLibrary

    part = None if shards is None else parse_range(shards)
    path = as_path(folder)
    library = ShardLibrary(
        path,
        shards=part,
        model=loading.model,
        backend=loading.backend,
        device=loading.device,
        precision=loading.precision,
    )
    with engine.opened() as workers, progress_bar(_("indexing images")) as on_progress:
        options = Options(codes=codes, recall=recall, lists=lists, workers=workers, retrain=retrain)
        done = build_index(
            path,
            lambda: library.embedder().embed_texts(background_words()),
            options,
            shards=part,
            on_progress=on_progress,
        )
    if json:
        print_json({"folder": folder} | asdict(done))
        return 0
    print(
        _(
            "{rows:,} images of {shards:,} shards in {lists:,} lists, {megabytes:,.0f} MB; a "
            "search scans {probes:,} lists and scores {candidates:,} images exactly, recall "
            "{recall:.3f}",
            rows=done.rows,
            shards=done.shards,
            lists=done.lists,
            megabytes=done.bytes / 1e6,
            probes=done.probes,
            candidates=done.candidates,
            recall=done.recall,
        )
    )
    return 0
