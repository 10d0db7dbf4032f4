"""The package as a whole: public names, import bands, cost of imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cn_clip

SOURCE = Path(cn_clip.__file__).parent
DOCS = Path(__file__).parent.parent / "docs"


def rows_of(page):
    """Return the rows of the table in architecture.md, each as its paths, from top to bottom."""
    table = re.findall(r"^\|[^|]*\| (`[^|]*`) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"`([^`]+)`", paths) for paths in table]


ROWS = rows_of(DOCS / "architecture.md")
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def row_of(file):
    """Return the row number of a file; None for an ``__init__.py`` that is in no row."""
    rows = [n for n, paths in enumerate(ROWS) for path in paths if path_covers(path, file)]
    if not rows and file.endswith("__init__.py"):
        return None
    assert len(rows) == 1, f"{file} is in {len(rows)} rows of docs/architecture.md"
    return rows[0]


def path_covers(path, file):
    return file.startswith(path) if path.endswith("/") else file == path


def imports_of(file):
    """Yield the imports of a file: paths of our files, and names of other modules."""
    for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield file_of(f"{node.module}.{alias.name}") or file_of(node.module) or node.module
        elif isinstance(node, ast.Import):
            yield from (file_of(alias.name) or alias.name for alias in node.names)


def file_of(module):
    path = module.removeprefix("cn_clip").removeprefix(".").replace(".", "/")
    options = (f"{path}.py", f"{path}/__init__.py" if path else "__init__.py")
    return next((path for path in options if module.startswith("cn_clip") and path in FILES), None)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_its_own_row_or_rows_below(file):
    own_row = row_of(file)
    for name in imports_of(file):
        assert name.split(".")[0] not in ("torchvision", "timm"), f"{file} imports {name}"
        row = row_of(name) if name in FILES else None
        if own_row is not None and row is not None:
            assert row >= own_row, f"{file} imports {name}, which is in a higher row"


def test_every_path_of_the_architecture_exists_in_both_languages():
    for paths in ROWS:
        for path in paths:
            assert (SOURCE / path).exists(), path
    assert rows_of(DOCS / "zh" / "architecture.md") == ROWS


def test_the_public_names():
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
        "embeddings",
        "find_images",
        "load",
    ]
    for name in cn_clip.__all__:
        assert getattr(cn_clip, name) is not None
    assert set(dir(cn_clip)) == set(cn_clip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cn_clip.nothing


def loaded_by(statement):
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_cn_clip_imports_neither_torch_nor_numpy():
    assert not {"torch", "numpy", "PIL", "tokenizers"} & loaded_by("import cn_clip")
    assert "torch" not in loaded_by("import cn_clip; cn_clip.load; cn_clip.classify")


def test_config_tokenizer_and_fingerprint_of_mini_need_no_torch():
    statement = """
from cn_clip.fingerprint import folder_fingerprint
from cn_clip.hub import EMBEDDED_FOLDER
from cn_clip.tokenizer import default_tokenizer
from cn_clip.weights import read_config
read_config(EMBEDDED_FOLDER)
default_tokenizer()
print(folder_fingerprint(EMBEDDED_FOLDER))
"""
    loaded = loaded_by(statement)
    assert "torch" not in loaded and cn_clip.load().fingerprint in loaded


def test_the_facade_imports_nothing_heavy_except_torch():
    heavy = {"torchvision", "timm", "huggingface_hub", "modelscope", "rich", "cyclopts", "sympy"}
    extra = loaded_by("import cn_clip.clip") - loaded_by("import torch")
    assert not heavy & extra


def test_help_does_not_import_torch():
    assert "torch" not in loaded_by("from cn_clip.cli import run; run(['--help'])")
