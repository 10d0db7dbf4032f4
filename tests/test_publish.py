"""Whole or not at all."""

from functools import partial

import pytest

from cn_clip.publish import STAMP, published, published_folder


def test_a_file_appears_when_it_is_whole(tmp_path):
    with published(tmp_path / "new" / "file") as temporary:
        temporary.write_text("content")
        assert not (tmp_path / "new" / "file").exists()
    assert (tmp_path / "new" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("publish", [published, partial(published_folder, command="test")])
def test_an_error_leaves_the_old_one_and_no_litter(tmp_path, publish, error):
    target = tmp_path / "target"
    with publish(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("old")
    with pytest.raises(error), publish(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half of the ne")
        raise error
    assert (target / "a" if target.is_dir() else target).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for name in ("a", "b"):
        with published_folder(tmp_path / "target", "test") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "target").iterdir() if path.name != STAMP] == ["b"]
