"""The format of a weights file, detected from its bytes, not from its name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from cn_clip.errors import CheckpointError
from cn_clip.files import HEAD, wrong_format
from cn_clip.translation import N_, _, translate

Content = Literal["safetensors", "archive", "pickle"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
_MAX_DIRECTORY_BYTES = 16 << 20  # about 200,000 tensors
_AGAIN = N_("download or copy it again")


def detect_format(path: Path) -> Content:
    """Return the format of a weights file.

    Raises:
        CheckpointError: it is not a weights file; the message names its kind and the remedy.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(HEAD)
    except OSError as error:
        raise CheckpointError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None
    if not start:
        raise CheckpointError(
            _("{path} is empty (0 bytes); {again}", path=path, again=translate(_AGAIN))
        )
    if not any(start):
        raise CheckpointError(
            _(
                "{path} starts with zeros, as after a broken download; {again}",
                path=path,
                again=translate(_AGAIN),
            )
        )
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= header <= _MAX_HEADER_BYTES:
        if size < 8 + header:
            raise CheckpointError(
                _(
                    "{path} is not a valid safetensors file: truncated; {again}",
                    path=path,
                    again=translate(_AGAIN),
                )
            )
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "archive"
    if start.startswith(b"\x80") and start[257:262] != b"ustar":
        return "pickle"
    reason = wrong_format(start)
    if reason is None and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        reason = _("a JSON file, not weights; give its folder or the weights file")
    if reason is not None:
        raise CheckpointError(_("{path} is {reason}", path=path, reason=reason))
    kind = _("safetensors file") if path.suffix == ".safetensors" else _(".pt file")
    raise CheckpointError(
        _(
            "{path} is not a valid {kind}: unknown first bytes; {again}",
            path=path,
            kind=kind,
            again=translate(_AGAIN),
        )
    )


def checked_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a ``.pt`` archive, after checks of everything that readers trust.

    Raises:
        CheckpointError: the archive is damaged, compressed or encrypted, or its sizes or names
            are inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            _check_end(stream, size)
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
    except Exception as error:  # zipfile raises many kinds on damaged files
        raise CheckpointError(
            _(
                "{path} is not a valid .pt file ({error}); {again}",
                path=path,
                error=error,
                again=translate(_AGAIN),
            )
        ) from None
    names = {member.orig_filename.lower() for member in members}
    compressed = [m.orig_filename for m in members if m.compress_type or m.flag_bits & 1]
    needed = [name for name in compressed if "/code/" not in name]  # TorchScript's code is
    if needed:
        raise CheckpointError(
            _(
                "{path} is compressed or encrypted ({needed}), unlike files of torch.save; load "
                "it with torch and save it again",
                path=path,
                needed=needed[0],
            )
        )
    stored = [member for member in members if member.orig_filename not in compressed]
    if len(names) < len(members) or sum(member.file_size for member in stored) > size:
        raise CheckpointError(
            _(
                "{path} is not a valid .pt file: its members overlap; {again}",
                path=path,
                again=translate(_AGAIN),
            )
        )
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        first = ", ".join(member.orig_filename for member in members[:3]) or _("nothing")
        raise CheckpointError(
            _(
                "{path} is a zip archive, but not one of torch (it contains {first}); if the "
                "weights are inside, unpack it",
                path=path,
                first=first,
            )
        )
    return members


def _check_end(stream: BinaryIO, size: int) -> None:
    """Raise a ``ValueError`` unless the end of an archive is that of ``torch.save``.

    zipfile and torch's reader search the directory in different ways. It must be at the one offset
    where both find it; else the checked directory is not the one that torch reads.
    """
    end = size - 22
    stream.seek(max(0, end))
    record = stream.read(22)
    if len(record) < 22 or not record.startswith(b"PK\x05\x06") or record[20:] != b"\0\0":
        raise ValueError(_("its end is missing"))
    length, start = (int.from_bytes(record[at : at + 4], "little") for at in (12, 16))
    stream.seek(max(0, end - 20))
    locator = stream.read(20)
    if locator.startswith(b"PK\x06\x07"):  # ZIP64: 4 GB and more
        end = int.from_bytes(locator[8:16], "little")
        stream.seek(min(end, size))
        record = stream.read(56)
        length, start = (int.from_bytes(record[at : at + 8], "little") for at in (40, 48))
    if length > _MAX_DIRECTORY_BYTES or start + length != end:
        raise ValueError(_("its directory is not at its end"))
