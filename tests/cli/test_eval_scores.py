"""``eval zeroshot``, ``eval calibrate`` and a calibration in ``classify``, as a user runs them."""

import csv
import json

import pytest
from conftest import encoded, make_image
from eval.labelled_folder import write_labelled

from cn_clip import weights
from cn_clip.cli import run


@pytest.fixture
def model(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def cn_clip(capsys):
    def command(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def calibration(tiny_model, tmp_path):
    """An arbitrary calibration of the tiny model."""
    from cn_clip.calibration import Calibration, Logistic, write_calibration
    from cn_clip.embedder import Embedder

    counts = dict.fromkeys(("images", "texts", "pairs", "non_pairs"), 100)
    thresholds = {"search": None, "labels": 0.99}
    fingerprint = Embedder.from_model(tiny_model).fingerprint
    write_calibration(
        Calibration("tiny", fingerprint, Logistic(5.0, -1.0), 0.5, 0.9, thresholds, counts, "d",
                    "2025-01-01"),
        tmp_path / "c.json",
    )  # fmt: skip
    return tmp_path / "c.json"


def test_zeroshot_prints_the_metric_and_confusions(cn_clip, model, tmp_path):
    root = write_labelled(tmp_path / "pets")
    code, out, err = cn_clip("eval", "zeroshot", "--data", root, "--model", model)
    assert code == 0 and err == ""
    assert "accuracy (metric of the dataset)" in out and "predicted" in out and "6 images" in out
    code, out, _ = cn_clip("eval", "zeroshot", "--data", root, "--model", model, "--json")
    document = json.loads(out)
    assert document["images"] == 6 and document["value"] == document["top1"]


def test_zeroshot_takes_metric_and_submission_from_the_dataset(cn_clip, model, tmp_path):
    from cn_clip.eval.zeroshot import datasets

    root = write_labelled(tmp_path / "voc-2007-classification")
    code, out, err = cn_clip("eval", "zeroshot", "--data", root, "--model", model, "--json")
    assert code == 0 and json.loads(out)["value"] is None
    assert "has 20 test classes, but the folder has 3" in err and "--truth" in err
    info = datasets()["hateful-memes"]
    write_labelled(tmp_path / "memes", ("好", "坏"), ("0", "1"))
    for at in range(info.images - 4):
        make_image(at, (8, 8)).save(tmp_path / "memes/test/0" / f"more{at}.png")
    out_file = tmp_path / "s.json"
    code, out, err = cn_clip("eval", "zeroshot", "--data", tmp_path / "memes", "--model", model,
                             "--dataset", "hateful-memes", "--submission", out_file)  # fmt: skip
    assert code == 0 and err == "" and "roc-auc" in out
    document = json.loads(out_file.read_text())
    assert document["dataset_name"] == "hateful-memes"
    assert len(document["predictions"][0]) == 500 and document["num_params"] > 0


def test_zeroshot_lists_unreadable_images_and_exits_with_1(cn_clip, model, tmp_path):
    root = write_labelled(tmp_path / "pets")
    (root / "test/000/0.jpg").write_bytes(encoded(make_image(), "JPEG")[:300])
    code, _, err = cn_clip("eval", "zeroshot", "--data", root, "--model", model)
    assert code == 1 and "0.jpg is damaged" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["zeroshot", "--data", "{root}", "--dataset", "cifar10"], 2, "did you mean cifar-10"),
        (["zeroshot", "--data", "{root}", "--templates", "sky"], 2, "unknown templates 'sky'"),
        (["zeroshot", "--data", "none"], 1, "label_cn.txt cannot be read"),
        (["zeroshot", "--data", "{root}", "--submission", "s.json"], 2, "needs --dataset"),
        (["zeroshot", "--data", "{root}", "--dataset", "mnist", "--submission", "s.json"], 2,
         "needs the whole test set"),
        (["calibrate", "--data", "none.csv", "--out", "c.json"], 1, "none.csv"),
        (["calibrate", "--data", "{root}", "--out", "{root}"], 2, "is a folder; give a file"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_sentence(cn_clip, tmp_path, arguments, code, message):
    root = str(write_labelled(tmp_path / "pets"))
    got, out, err = cn_clip("eval", *(root if each == "{root}" else each for each in arguments))
    assert (got, out) == (code, "")
    assert message in err and err.startswith("cn-clip: ") and err.count("\n") == 1


def test_calibrate_refuses_an_uninformative_model_or_writes_the_file(cn_clip, model, tmp_path):
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "text"])
        for seed in range(80):
            make_image(seed, (24, 24)).save(tmp_path / f"{seed}.png")
            rows.writerow([f"{seed}.png", f"第{seed}张图"])
    out = tmp_path / "c.json"
    code, shown, err = cn_clip("eval", "calibrate", "--data", tmp_path / "pairs.csv", "--out", out,
                               "--model", model, "--precision", 0.05, "--json")  # fmt: skip
    if code == 0:  # an untrained model may separate pairs from non-pairs by chance
        assert json.loads(shown)["thresholds"] == json.loads(out.read_text())["thresholds"]
    else:
        assert code == 2 and "no higher cosines" in err and not out.exists()


def test_classify_prints_the_match_and_none_of_these(cn_clip, model, calibration, image_folder):
    common = ("classify", image_folder, "--labels", "猫,狗", "--model", model,
              "--calibration", calibration)  # fmt: skip
    code, out, err = cn_clip(*common)
    assert code == 0 and err == ""
    assert out.count("match") == 3 and out.count("none of these") == 3
    code, out, _ = cn_clip(*common, "--json")
    for image in json.loads(out)["images"]:
        assert image["none_of_these"] is True
        assert all(0 < row["match"] < 1 for row in image["predictions"])


def test_classify_refuses_a_calibration_of_another_model(cn_clip, model, calibration, image_folder):
    values = json.loads(calibration.read_text()) | {"fingerprint": "0" * 32}
    calibration.write_text(json.dumps(values))
    code, out, err = cn_clip("classify", image_folder, "--labels", "猫,狗", "--model", model,
                             "--calibration", calibration)  # fmt: skip
    assert (code, out) == (2, "") and "eval calibrate" in err and err.count("\n") == 1


def test_classify_and_the_library_agree(cn_clip, model, calibration, image_folder):
    import cn_clip as library

    values = json.loads(calibration.read_text())
    for threshold in (-1.0, 0.99, None):
        values["thresholds"]["labels"] = threshold
        calibration.write_text(json.dumps(values))
        code, out, _ = cn_clip("classify", image_folder, "--labels", "猫,狗,火箭", "--model",
                               model, "--calibration", calibration, "--json")  # fmt: skip
        assert code == 0
        images = json.loads(out)["images"]
        result = library.classify(
            library.load(model),
            [image["image"] for image in images],
            ["猫", "狗", "火箭"],
            calibration=calibration,
        )
        flags = [None] * 3 if result.none_of_these is None else result.none_of_these.tolist()
        assert [image["none_of_these"] for image in images] == flags
        assert flags == [None if threshold is None else threshold == 0.99] * 3
        for row, image in enumerate(images):
            for prediction in image["predictions"]:
                column = result.labels.index(prediction["label"])
                assert prediction["probability"] == result.probabilities[row, column]
                assert prediction["cosine"] == result.cosines[row, column]
                assert prediction["match"] == result.match_probabilities[row, column]
