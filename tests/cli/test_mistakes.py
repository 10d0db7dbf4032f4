"""Fifty usual mistakes: one sentence that names the value and the remedy, exit code 1 or 2.

Mistakes of ``classify`` and of training are also in ``test_cli`` and ``test_flags``.
"""

import pytest
from conftest import TINY, encoded, make_image, make_model

from cn_clip import weights
from cn_clip.cli import run

TRAIN = "train --recipe finetune-muge --output.folder out --start.checkpoint model"
# command line, exit code, the value and the remedy in the message
MISTAKES = [
    # Names of commands, options and choices
    ("clasify photos --labels 猫,狗", 2, "clasify", "did you mean classify?"),
    ("models --colour", 2, "--colour", "--help"),
    ("doctor now", 2, "now", "--help"),
    ("embed photos --out x.npz", 2, "photos", "images"),
    ("embed images photos", 2, "--out", "is missing"),
    ("embed images --out x.npz", 2, "nothing to embed", "give the images after"),
    ("classify photos --labels 猫,狗 --precision half", 2, "half", "fp16"),
    ("convert model.pt out --to hf5", 2, "hf5", "hf"),
    ("export --model model --to onx", 2, "onx", "onnx"),
    ("data pack csv:pairs.csv --out out --to zip", 2, "zip", "lmdb"),
    ("data pack csv:pairs.csv --out out --format gif", 2, "gif", "jpeg"),
    ("serve --port 99999", 2, "99999", "65535"),
    ("eval protocol mugee --data x", 2, "mugee", "muge-valid"),
    # Files and folders
    ("classify https://x.y/a.jpg --labels 猫,狗", 1, "https://x.y/a.jpg", "download the image"),
    ("classify notes.docx --labels 猫,狗", 1, "notes.docx", "convert it"),
    ("classify cut.jpg --labels 猫,狗", 1, "cut.jpg", "replace the file"),
    ("classify photos --labels-file gbk.txt", 2, "gbk.txt", "save it as UTF-8"),
    ("classify photos --labels 猫,狗 --calibration empty.json", 2, "empty.json", "fit one with"),
    ("embed images notes.docx --out x.npz", 2, "notes.docx", "convert it"),
    ("embed texts 一只猫 --out x.npz", 2, "一只猫", ".txt"),
    ("embed texts gbk.txt --out x.npz", 2, "gbk.txt, line 2", "save the file as UTF-8"),
    ("index nowhere --library lib", 2, "nowhere", "no such folder"),
    ("search 猫 --library ./lib", 1, "lib", "cn-clip index"),
    ("data check pairs", 2, "pairs", "KIND:PATH"),
    ("data check csv:none.csv", 1, "none.csv", "no such file"),
    ("data check list.json", 2, "list.json", "one object per line"),
    ("data check csv:columns.csv", 1, "pfad, wort", "?image=COLUMN"),
    ("data check csv:pairs.csv?picture=x", 2, "picture", "image"),
    ("eval retrieval", 2, "no pairs", "--data"),
    ("eval retrieval --data csv:none.csv", 1, "none.csv", "no such file"),
    ("eval predictions pred.jsonl --truth truth.jsonl", 1, "text_id '1'", "at least 10"),
    ("eval zeroshot --data photos", 1, "label_cn.txt", "one Chinese label per line"),
    # Models
    ("classify photos --labels 猫,狗 --model ViT-B/61", 2, "ViT-B/61", "did you mean ViT-B-16"),
    ("classify photos --labels 猫,狗 --model none.pt", 2, "none.pt", "no such file"),
    ("classify photos --labels 猫,狗 --model lfs.pt", 1, "lfs.pt", "git lfs pull"),
    ("classify photos --labels 猫,狗 --model empty.pt", 1, "empty.pt", "again"),
    ("classify photos --labels 猫,狗 --model photos", 1, "photos", "config.json"),
    ("classify photos --labels 猫,狗 --model photos/0.jpg", 1, "0.jpg", "not a valid .pt"),
    ("classify photos --labels 猫,狗 --device cuda:7", 2, "cuda:7", "cpu"),
    ("convert none.pt out --to hf", 1, "none.pt", "no such file"),
    ("export --model nothing --out out", 2, "nothing", "mini"),
    # Outputs
    ("embed images photos --out x.csv", 2, "x.csv", ".npz"),
    ("embed images photos --out photos/x.npz", 2, "photos/x.npz", "outside of it"),
    ("data pack csv:pairs.csv --out photos", 2, "photos", "another place"),
    ("convert model.pt model.pt --to safetensors", 2, "model.pt", "give a folder"),
    # Training
    ("train", 2, "which recipe", "finetune-muge"),
    ("train --recipe finetune-mug", 2, "finetune-mug", "did you mean finetune-muge"),
    (TRAIN, 2, "no training data", "--train-data"),
    (f"{TRAIN} --train-data csv:none.csv", 1, "none.csv", "no such file"),
    (f"{TRAIN} --train-data csv:pairs.csv --lr fast", 2, "fast", "give a number"),
    (f"{TRAIN} --train-data csv:pairs.csv --learning-rat 1", 2, "learning-rat", "did you mean"),
    (f"{TRAIN} --train-data csv:pairs.csv --epochs 0", 2, "epochs", "give 1 to"),
    (f"{TRAIN} --train-data csv:pairs.csv --batch-size 1", 2, "--batch-size", "give 2 to"),
    (f"{TRAIN} --train-data csv:pairs.csv --start.checkpoint none.pt", 1, "none.pt", ""),
    (f"{TRAIN} --train-data csv:pairs.csv --output.folder photos", 2, "photos", "another place"),
    (f"{TRAIN} --train-data csv:pairs.csv --machine.device cuda", 2, "cuda", "cpu"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with what a user may have."""
    root = tmp_path_factory.mktemp("place")
    (root / "photos").mkdir()
    for seed in range(3):
        make_image(seed).save(root / "photos" / f"{seed}.jpg")
    model = make_model(TINY["vit"])
    weights.save_folder(model, root / "model")
    weights.save_official(model, root / "model.pt")
    rows = [f"photos/{n}.jpg,{text}" for n, text in enumerate("猫狗鸟")]
    for name, columns in (("pairs", "image,text"), ("columns", "pfad,wort")):
        (root / f"{name}.csv").write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    (root / "gbk.txt").write_bytes("猫\n狗\n".encode("gbk"))
    (root / "cut.jpg").write_bytes(encoded(make_image(), "JPEG")[:300])
    (root / "notes.docx").write_bytes(b"PK\x03\x04 a document")
    (root / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (root / "empty.pt").touch()
    (root / "list.json").write_text("[1, 2]")
    (root / "empty.json").write_text("{}")
    (root / "pred.jsonl").write_text('{"text_id": 1, "image_ids": [1, 2]}\n')
    (root / "truth.jsonl").write_text('{"text_id": 1, "text": "x", "image_ids": [1]}\n')
    return root


def test_there_are_fifty():
    assert len({line for line, *_ in MISTAKES}) >= 50


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("line", "code", "value", "remedy"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_value_and_remedy(
    place, monkeypatch, capsys, line, code, value, remedy
):
    monkeypatch.chdir(place)
    assert run(line.split()) == code
    _out, err = capsys.readouterr()
    (sentence,) = err.splitlines()
    assert sentence.startswith("cn-clip: ") and len(sentence) <= 310
    assert value in sentence and remedy in sentence
    assert "Traceback" not in err and "please report" not in err
