"""Local files of named models."""

import sys

import pytest

from cn_clip import hub
from cn_clip.errors import MissingWeightsError, UnknownModelError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_embedded_model_needs_no_download():
    assert (hub.find("mini") / "config.json").is_file()


def test_download_root_comes_before_the_cache(tmp_path, empty_cache):
    assert hub.find("RN50", tmp_path / "mine") is None
    for folder in (empty_cache, tmp_path / "mine"):
        folder.mkdir()
        (folder / "clip_cn_rn50.pt").touch()
        assert hub.find("RN50", tmp_path / "mine") == folder / "clip_cn_rn50.pt"


def test_a_missing_modelscope_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it were not installed
    with pytest.raises(MissingWeightsError, match="pip install modelscope"):
        hub.locate("RN50", download_root=tmp_path, use_modelscope=True)


def test_names_of_repositories_are_recognised():
    assert hub.is_repository("TencentARC/QA-CLIP-ViT-B-16")
    for name in ("ViT-B/16", "RN50", "models/fine.pt", "./models/mine", "a/b/c", "/tmp/x", "~/x"):
        assert not hub.is_repository(name), name


@pytest.fixture
def hugging_face_cache(tmp_path, monkeypatch):
    """Create a cache in the layout of Hugging Face's library, without network."""
    cache = tmp_path / "huggingface"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def keep(repository, *names):
        folder = cache / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c" * 40)
        for name in names:
            (snapshot / name).touch()
        return snapshot

    return keep


def test_a_model_in_the_hugging_face_cache_loads_offline(hugging_face_cache, tmp_path):
    official = hugging_face_cache("OFA-Sys/chinese-clip-rn50", "README.md", "clip_cn_rn50.pt")
    assert hub.locate("RN50", download_root=tmp_path) == official / "clip_cn_rn50.pt"
    names = ("config.json", "pytorch_model.bin")
    converted = hugging_face_cache("OFA-Sys/chinese-clip-vit-base-patch16", *names)
    assert hub.locate("ViT-B-16", download_root=tmp_path) == converted
    other = hugging_face_cache("someone/QA-CLIP", "config.json", "model.safetensors")
    assert hub.locate("someone/QA-CLIP", download_root=tmp_path) == other


def test_a_hugging_face_cache_without_weights_is_ignored(hugging_face_cache, tmp_path):
    hugging_face_cache("OFA-Sys/chinese-clip-rn50", "README.md")
    for name in ("RN50", "ViT-H-14"):
        assert hub.find(name) is None
        with pytest.raises(MissingWeightsError, match="put it into"):
            hub.locate(name, download_root=tmp_path)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownModelError, match="did you mean RN50"):
        hub.find("RN5O")
