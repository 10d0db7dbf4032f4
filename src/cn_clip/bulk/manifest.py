"""The record of a finished shard. A shard is done if and only if its manifest exists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cn_clip.bulk.plan import Embed
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.format_version import FIELD, Format
from cn_clip.translation import _

FOLDER = "manifests"
MANIFEST = Format("bulk-manifest", 1)
_VERSION = str(MANIFEST)
NAME = re.compile(r"(\d{5,})\.json")


@dataclass(frozen=True, slots=True)
class Written:
    """A file of a shard."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a shard holds, and how it was made.

    Attributes:
        shard: its number.
        plan: digest of the plan.
        key: digest of its inputs, in hexadecimal.
        rows_in: inputs.
        rows_out: embeddings.
        quarantined: inputs without one.
        files: name -> what was written.
        seconds: from the first input until its files are written, before they are published.
        attempt: 1, or more if earlier attempts did not end.
        host: that computed it.
        model: fingerprint.
        versions: of this package and of what computes, for people.
    """

    shard: int
    plan: str
    key: str
    rows_in: int
    rows_out: int
    quarantined: int
    files: Mapping[str, Written]
    seconds: float
    attempt: int
    host: str
    model: str
    versions: Mapping[str, str]

    def to_json(self) -> bytes:
        """Return the content of the manifest's file."""
        return (json.dumps({FIELD: str(MANIFEST), **asdict(self)}) + "\n").encode()


def manifest_name(number: int) -> str:
    """Return the name of the manifest of a shard."""
    return f"{FOLDER}/{number:05}.json"


def data_names(number: int, embed: Embed) -> list[str]:
    """Return the names of the files that every shard has: vectors, then metadata."""
    stems = {"images": ["img_emb"], "texts": ["text_emb"], "both": ["img_emb", "text_emb"]}[embed]
    vectors = [f"{stem}/{stem}_{number:05}.npy" for stem in stems]
    return [*vectors, f"metadata/metadata_{number:05}.parquet"]


def quarantine_name(number: int) -> str:
    """Return the name of the list of the inputs of a shard that have no embedding."""
    return f"quarantine/{number:05}.jsonl"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: it is damaged.
        UsageError: it is of a newer version.
    """
    try:
        values = json.loads(content.decode())
        if (version := values.pop(FIELD)) != _VERSION:
            MANIFEST.check_not_newer(version, where, UsageError)
            MANIFEST.check(version, where, DataError, _("compute its shard again"))
        files = {name: Written(**file) for name, file in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
        if not _is_valid(manifest):
            raise ValueError
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CNClipError):
            raise
        raise DataError(
            _("{path} is damaged; cn-clip bulk verify --discard removes it", path=where)
        ) from None


def _is_valid(manifest: Manifest) -> bool:
    """Return whether values have their types, and the numbers add up."""
    for count in (manifest.rows_in, manifest.rows_out, manifest.quarantined, manifest.attempt):
        if type(count) is not int or not 0 <= count < 1 << 32:
            return False
    for file in manifest.files.values():
        if type(file.bytes) is not int or not 0 <= file.bytes < 1 << 63:
            return False
    return (
        float(manifest.seconds) >= 0
        and 0 <= int(manifest.key, 16) < 1 << 64
        and manifest.rows_in == manifest.rows_out + manifest.quarantined
    )
