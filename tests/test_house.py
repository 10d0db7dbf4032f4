"""The house itself: exported names, import bands, what imports cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cn_clip

SOURCE = Path(cn_clip.__file__).parent

# A file may import from lower bands, and from its own where the band is one folder's work.
BANDS = {
    "arrays": 0,
    "errors": 0, "config": 0, "distributed": 0, "publish": 0, "tokenizer": 0, "image": 0,
    "image_limits": 0, "image_modes": 0, "text": 0, "files": 0,
    "successors": 0,
    "processes": 0,
    "model": 1,
    "weights": 2, "hub": 2, "fingerprint": 2, "inputs": 2, "data": 2,
    "embedder": 3, "backends": 3, "clip": 3, "zeroshot": 3, "convert": 3, "features": 3,
    "extract": 4, "eval": 4,
    "train": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
# The one road between siblings of different files in a band.
SAME_BAND = {
    ("config", "errors"), ("image", "config"), ("image", "errors"),
    ("image", "image_limits"), ("image", "image_modes"), ("image_limits", "errors"),
    ("image_modes", "errors"), ("tokenizer", "errors"),
    ("distributed", "errors"), ("publish", "errors"),
    ("files", "errors"), ("files", "text"), ("image", "files"), ("inputs", "data"),
    ("distributed", "processes"),
    ("arrays", "errors"),
    ("embedder", "backends"), ("zeroshot", "embedder"), ("convert", "backends"),
    ("convert", "embedder"), ("clip", "backends"),
    ("__main__", "cli"),
}  # fmt: skip


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "cn_clip":
                yield from (f"cn_clip.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_lead_to_lower_bands_only(path):
    if path == SOURCE / "__init__.py":
        return
    home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[0] not in ("torchvision", "timm"), f"{path} imports {name}"
        if parts[0] != "cn_clip" or len(parts) == 1 or parts[1] in (home, "__version__"):
            continue
        allowed = BANDS[parts[1]] < BANDS[home] or (home, parts[1]) in SAME_BAND
        assert allowed, f"{path.name} (band {BANDS[home]}) imports {name}"


def test_public_names_are_these():
    assert sorted(cn_clip.__all__) == [
        "CNClipError",
        "CheckpointError",
        "Classification",
        "Embedder",
        "ImageError",
        "MissingWeightsError",
        "UnknownModelError",
        "UsageError",
        "__version__",
        "classify",
        "load",
    ]
    for name in cn_clip.__all__:
        assert getattr(cn_clip, name) is not None
    assert set(dir(cn_clip)) == set(cn_clip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cn_clip.nothing


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_cn_clip_loads_neither_torch_nor_numpy():
    assert not {"torch", "numpy", "PIL", "tokenizers"} & loaded_by("import cn_clip")
    assert "torch" not in loaded_by("import cn_clip; cn_clip.load; cn_clip.classify")


def test_the_facade_loads_nothing_heavy_beside_torch():
    heavy = {"torchvision", "timm", "huggingface_hub", "modelscope", "rich", "cyclopts", "sympy"}
    extra = loaded_by("import cn_clip.clip") - loaded_by("import torch")
    assert not heavy & extra


def test_the_command_lines_help_does_not_wait_for_torch():
    assert "torch" not in loaded_by("from cn_clip.cli import run; run(['--help'])")
