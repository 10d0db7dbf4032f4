"""Arrays of files that lie: what the header says is checked against what is there."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from cn_clip.arrays import read_npy, read_npz
from cn_clip.errors import DataError

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def npy(header, content=b""):
    raw = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + content


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("array", [ROWS, np.asfortranarray(ROWS), ROWS[:0], np.array(["猫", "x"])])
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, array, mapped):
    np.save(tmp_path / "x.npy", array)
    found = read_npy(tmp_path / "x.npy", mapped=mapped)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_arrays_are_read_by_name_and_optional_ones_may_be_missing(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", rows=ROWS)
    found = read_npz(tmp_path / "x.npz", ["rows"], optional=["about"])
    np.testing.assert_array_equal(found["rows"], ROWS)
    assert list(found) == ["rows"]
    with pytest.raises(DataError, match="no array 'ids'"):
        read_npz(tmp_path / "x.npz", ["ids"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "header is damaged"),
        (pickle.dumps([1]), "header is damaged"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,)}\n"), "header is damaged"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,)}\n"), "needs"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}\n", b"1234"), "needs 12"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n"), "shape"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", b"x" * 8), "of type"),
        (npy("(" * 3000), "header is damaged"),
    ],
)
def test_damage_is_named_before_memory_is_taken(tmp_path, content, told):
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("rows.npy", content)
    with pytest.raises(DataError, match=f"x.npy .*{told}"):
        read_npy(tmp_path / "x.npy")
    with pytest.raises(DataError, match=f"x.npz .*{told}"):
        read_npz(tmp_path / "x.npz", ["rows"])


def test_an_array_that_unfolds_to_much_more_than_there_is_is_refused(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.zeros(20 << 20, np.float32))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.npy", stream.getvalue())
    with pytest.raises(DataError, match="decompresses to 83,886,208 bytes"):
        read_npz(tmp_path / "x.npz", ["rows"])
