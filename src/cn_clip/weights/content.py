"""What a file of weights is, by its first bytes: its name may say anything."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from cn_clip.errors import CheckpointError

Content = Literal["safetensors", "archive", "pickle"]

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LONGEST_DIRECTORY = 16 << 20  # bytes; 200,000 tensors
_AGAIN = "download or copy it again"
# What people find under the name of weights: how it begins, what it is, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer of {size:,} bytes, not the file: git lfs pull"),
    (b"<!doctype html", "a web page, not the file; on Hugging Face its address has /resolve/"),
    (b"<html", "a web page, not the file; on Hugging Face its address has /resolve/"),
    (b"<?xml", "an XML page, such as a server's error message, not the file; download it again"),
    (b"{", "a JSON file, no weights; give the folder it is in, or the file of weights"),
    (b"\x1f\x8b", "packed with gzip; unpack it first"),
    (b"7z\xbc\xaf", "packed with 7-Zip; unpack it first"),
    (b"rar!", "packed with RAR; unpack it first"),
    (b"gguf", "a GGUF file of llama.cpp, which is not read here; give the original weights"),
    (b"\x89hdf", "an HDF5 file of Keras, which is not read here; give the PyTorch weights"),
    (b"\x93numpy", "a NumPy array, not a model's weights"),
)


def content_of(path: Path) -> Content:
    """Tell how a file holds tensors.

    Raises:
        CheckpointError: it holds none; what it is instead is named, with the remedy.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes); {_AGAIN}")
    if not any(start):
        raise CheckpointError(f"{path} begins with zeros, as after a broken download; {_AGAIN}")
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= header <= _LONGEST_HEADER:
        if size < 8 + header:
            raise CheckpointError(f"{path} is not a whole safetensors file: cut off; {_AGAIN}")
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "archive"
    if start.startswith(b"\x80") and start[257:262] != b"ustar":
        return "pickle"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for begins, what in _OTHERS:
        if text.startswith(begins):
            raise CheckpointError(f"{path} is {what.format(size=size)}")
    kind = "safetensors file" if path.suffix == ".safetensors" else ".pt file"
    raise CheckpointError(f"{path} is not a whole {kind}: it begins as none does; {_AGAIN}")


def members_of(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a ``.pt`` archive, after a look at what readers would trust.

    Raises:
        CheckpointError: it is damaged, packed or encrypted, or its sizes or names lie.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            _check_end(stream, size)
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
    except Exception as error:  # zipfile, on bytes that may be anything
        raise CheckpointError(f"{path} is not a whole .pt file ({error}); {_AGAIN}") from None
    names = {member.orig_filename.lower() for member in members}
    packed = [m.orig_filename for m in members if m.compress_type or m.flag_bits & 1]
    read_here = [name for name in packed if "/code/" not in name]  # TorchScript packs its code
    if read_here:
        raise CheckpointError(
            f"{path} is packed or encrypted ({read_here[0]}), as torch.save writes none; unpack "
            "it, load it with torch and save it again"
        )
    stored = [member for member in members if member.orig_filename not in packed]
    if len(names) < len(members) or sum(member.file_size for member in stored) > size:
        raise CheckpointError(f"{path} is not a whole .pt file: its members overlap; {_AGAIN}")
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        first = ", ".join(member.orig_filename for member in members[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is a zip archive, but none of torch (it holds {first}); if the weights are "
            "inside, unpack it"
        )
    return members


def _check_end(stream: BinaryIO, size: int) -> None:
    """Raise a ``ValueError`` unless an archive ends as torch ends it.

    zipfile and torch's own reader look for the list of members in different ways; at the one place
    where they agree it must be, or what is checked here is not what is read there.
    """
    end = size - 22
    stream.seek(max(0, end))
    record = stream.read(22)
    if len(record) < 22 or not record.startswith(b"PK\x05\x06") or record[20:] != b"\0\0":
        raise ValueError("its end is missing")
    length, start = (int.from_bytes(record[at : at + 4], "little") for at in (12, 16))
    stream.seek(max(0, end - 20))
    locator = stream.read(20)
    if locator.startswith(b"PK\x06\x07"):  # of an archive of 4 GB and more
        end = int.from_bytes(locator[8:16], "little")
        stream.seek(min(end, size))
        record = stream.read(56)
        length, start = (int.from_bytes(record[at : at + 8], "little") for at in (40, 48))
    if length > _LONGEST_DIRECTORY or start + length != end:
        raise ValueError("its list of members is not where it should be")
