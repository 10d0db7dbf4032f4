"""Texts with their embeddings, read back from clip-retrieval's layout."""

import numpy as np
import pytest
from train.runs import CAPTIONS

from cn_clip.embeddings.files import (
    EmbeddingsToWrite,
    read_captions,
    read_embeddings,
    write_clip_retrieval,
    write_npz,
)
from cn_clip.errors import DataError, UsageError


def written(folder, texts):
    """Write texts whose vectors are the rows of an identity matrix."""
    vectors = np.eye(len(texts), 4, dtype=np.float32)
    rows = EmbeddingsToWrite(
        "texts", list(range(len(texts))), texts, 4, lambda a, b: vectors[a:b], {}
    )
    write_clip_retrieval(rows, folder)
    return folder


def test_captions_are_read_as_ids_with_their_vectors_in_order(tmp_path):
    folder = written(tmp_path / "texts", CAPTIONS[:3])
    found = read_captions(folder)
    assert found.ids == CAPTIONS[:3]
    np.testing.assert_array_equal(found.vectors, np.eye(3, 4))
    assert read_embeddings(folder, "texts").ids == ["0", "1", "2"]


def test_the_first_of_repeated_captions_is_kept(tmp_path):
    found = read_captions(written(tmp_path / "texts", ["一只猫", "狗", "一只猫", "马"]))
    assert found.ids == ["一只猫", "狗", "马"]
    np.testing.assert_array_equal(found.vectors, np.eye(4)[[0, 1, 3]])


@pytest.mark.parametrize("name", ["nowhere", "texts.npz"])
def test_captions_that_are_no_folder_are_named_with_the_command_that_makes_one(tmp_path, name):
    (tmp_path / "texts.npz").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"no folder .*{name}; make it with: cn-clip embed texts"):
        read_captions(tmp_path / name)


def test_a_folder_of_images_is_not_a_folder_of_captions(tmp_path):
    vectors = np.eye(1, 4, dtype=np.float32)
    rows = EmbeddingsToWrite("images", [0], ["0.png"], 4, lambda a, b: vectors[a:b], {})
    write_clip_retrieval(rows, tmp_path / "pictures")
    with pytest.raises(DataError, match="holds 0 files in text_emb and 1 in metadata"):
        read_captions(tmp_path / "pictures")


def test_damaged_features_are_one_sentence(tmp_path):
    about = {"kind": "images"}
    vectors = np.eye(3, 4, dtype=np.float32)
    rows = EmbeddingsToWrite(
        "images", ["a", "b", "c"], ["a", "b", "c"], 4, lambda a, b: vectors[a:b], about
    )
    write_npz(rows, tmp_path / "x.npz")
    write_clip_retrieval(rows, tmp_path / "folder")
    for place, file in (
        ("x.npz", "x.npz"),
        ("folder", "folder/img_emb/img_emb_0.npy"),
        ("folder", "folder/metadata/metadata_0.parquet"),
    ):
        whole = (tmp_path / file).read_bytes()
        for damaged in (
            whole[: len(whole) // 2],
            b"",
            bytes(len(whole)),
            b"PK\x03\x04" + whole[4:30],
        ):
            (tmp_path / file).write_bytes(damaged)
            with pytest.raises(DataError, match=rf"{file.rpartition('/')[2]} is not "):
                read_embeddings(tmp_path / place, "images")
        (tmp_path / file).write_bytes(whole)
        assert read_embeddings(tmp_path / place, "images").ids == ["a", "b", "c"]
