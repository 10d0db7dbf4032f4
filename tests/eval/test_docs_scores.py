"""The pages on scores: both languages alike, their Python runs, their tables are the package's."""

import pytest
from test_docs import DOCS, FENCE, ROOT, code_in, read

from cn_clip import load
from cn_clip.calibration import USES, Calibration, Logistic, write_calibration
from cn_clip.eval.zeroshot import datasets, template_names


@pytest.mark.parametrize("name", ["zeroshot.md", "scores.md"])
def test_both_languages_hold_the_same_code(name):
    assert code_in(DOCS / name) == code_in(DOCS / "zh" / name)


@pytest.mark.parametrize("page", [DOCS / "zeroshot.md", DOCS / "zh" / "zeroshot.md"])
def test_the_page_names_every_dataset_beside_its_metric_and_every_template(page):
    rows = [line for line in read(page).splitlines() if line.startswith("| ")]
    order = ("accuracy", "mean-per-class", "11-point-map", "roc-auc")
    for metric, row in zip(order, rows[-4:], strict=True):
        listed = row.split("|")[2].replace("、", ",").split(",")
        expected = [name for name, about in datasets().items() if about.metric == metric]
        assert [each.strip() for each in listed] == expected
    assert all(f"`{name}`" in read(page) for name in template_names())


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cn_clip.load", lambda: mini)
    mini = load()
    counts = dict.fromkeys(("images", "texts", "pairs", "non_pairs"), 100)
    calibration = Calibration(
        "mini", mini.fingerprint, Logistic(10.0, -1.0), 0.5, 0.9, dict.fromkeys(USES), counts,
        "d", "2025-01-01",
    )  # fmt: skip
    write_calibration(calibration, tmp_path / "c.json")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (block,) = (
        block for kind, block in FENCE.findall(read(DOCS / "scores.md")) if kind == "python"
    )
    scope = {}
    exec(compile(block, "docs/scores.md", "exec"), scope)
    assert scope["cosines"].shape == (1, 2) and capsys.readouterr().out.startswith("[[0.9")
