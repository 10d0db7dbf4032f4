"""The files of a source one by one, each opened in another process or on another machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip.data.process_map import Progress, no_progress
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import (
    absolute_uri,
    open_file,
    open_source,
    parse_uri,
    parts_of,
    source_files,
)
from cn_clip.data.sources.remote import RemoteFile, is_remote
from cn_clip.data.sources.shard_file import FileState, LocalFile, ShardFile, changed_message
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import UnavailableError
from cn_clip.files import as_path

_LMDB_FILES = ("imgs/data.mdb", "pairs/data.mdb")


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a source: what opens it, and what tells that it is unchanged.

    Attributes:
        kind: of the source.
        path: absolute path, or URL.
        options: of the source.
        states: of the file; of an LMDB or TSV those of its two files, of a folder none.
        pairs: how many it has.
    """

    kind: str
    path: str
    options: Mapping[str, str]
    states: tuple[FileState, ...]
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """Return the values that ``from_json`` reads."""
        return {
            "kind": self.kind,
            "path": self.path,
            "options": dict(self.options),
            "states": [list(state) for state in self.states],
            "pairs": self.pairs,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Part:
        """Read what ``to_json`` returned."""
        states = tuple(FileState(*state) for state in values["states"])
        return cls(values["kind"], values["path"], values["options"], states, values["pairs"])

    def open(self) -> Source:
        """Open the file.

        Raises:
            UnavailableError: it is missing, or has changed.
            DataError: it is damaged.
        """
        file = _shard_file(self.path)
        if self.kind == "tar":
            state = file.state()
            if state != self.states[0]:
                raise UnavailableError(changed_message(file.name))
            unpaired = "unpaired" in self.options
            return Tar(file, state=state, pairs=self.pairs, unpaired=unpaired)
        if _states(self.kind, file, self.options) != self.states:
            raise UnavailableError(changed_message(self.path))
        source = open_file(self.kind, file, self.options)
        if len(source) != self.pairs:
            raise UnavailableError(changed_message(self.path))
        return source


def parts_in(
    uri: str, *, workers: int = 0, on_progress: Progress = no_progress
) -> Iterator[tuple[Part, Source]]:
    """Open the files of a source one after the other, without a weight.

    Arguments and errors are those of ``open_source``.
    """
    uri = absolute_uri(uri)
    kind, _unused, options = parse_uri(uri)
    if kind == "tar":
        for shard in parts_of(open_source(uri, workers=workers, on_progress=on_progress)):
            assert isinstance(shard, Tar)
            own = {"unpaired": "yes"} if shard.unpaired else {}
            yield Part("tar", _path_of(shard.file), own, (shard.state,), len(shard)), shard
        return
    files = source_files(uri)
    for number, file in enumerate(files, 1):
        states = _states(kind, file, options)
        source = open_file(kind, file, options)
        yield Part(kind, _path_of(file), options, states, len(source)), source
        on_progress(number, len(files))


def _path_of(file: ShardFile) -> str:
    if isinstance(file, RemoteFile):
        return file.url
    assert isinstance(file, LocalFile)
    return os.path.abspath(file.path)


def _shard_file(path: str) -> ShardFile:
    return RemoteFile(path) if is_remote(path) else LocalFile(Path(path))


def _states(kind: str, file: ShardFile, options: Mapping[str, str]) -> tuple[FileState, ...]:
    if not isinstance(file, LocalFile):
        return (file.state(),)
    path = file.path
    files = [path]
    if kind == "folder":  # each of its files has a state of its own
        files = []
    elif kind == "lmdb":
        files = [path / name for name in _LMDB_FILES]
    elif kind == "tsv":
        beside = path.with_name(f"{path.name.removesuffix('_imgs.tsv')}_texts.jsonl")
        files.append(as_path(options["texts"]) if "texts" in options else beside)
    return tuple(LocalFile(file).state() for file in files)
