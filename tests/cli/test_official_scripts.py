"""The official scripts with the argument lines of the official run_scripts, on small data."""

import base64
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TEXT, TINY, encoded, make_image, make_model
from eval.labelled_folder import write_labelled
from train.runs import CAPTIONS

import cn_clip
from cn_clip import config, weights
from cn_clip.cli import guarded
from cn_clip.data.sources.open import open_source
from cn_clip.deploy import pytorch_to_onnx
from cn_clip.eval import (
    evaluation,
    evaluation_tr,
    extract_features,
    make_topk_predictions,
    make_topk_predictions_tr,
    transform_ir_annotation_to_tr,
    zeroshot_evaluation,
)
from cn_clip.preprocess import build_lmdb_dataset
from cn_clip.training import main as training

SOURCE = Path(cn_clip.__file__).parent
ROOT = Path(__file__).parent.parent.parent
SPLITS = {"train": range(24), "valid": range(100, 112), "test": range(120, 132)}


@pytest.fixture
def script(capsys):
    """Run a script in this process; return its exit code, stdout and stderr."""

    def run(module, *arguments):
        code = guarded(module.main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def small_official(monkeypatch):
    """Make ViT-B-16 the name of a tiny model."""
    tiny = TINY["vit"]
    monkeypatch.setitem(config.VISION_TOWERS, "ViT-B-16", tiny.vision)
    monkeypatch.setitem(config.TEXT_TOWERS, "RoBERTa-wwm-ext-base-chinese", TEXT)
    monkeypatch.setitem(config.EMBED_DIMS, "ViT-B-16", tiny.embed_dim)
    return make_model(tiny)


def write_official(dataset, splits):
    """Write the TSV and the texts of each split."""
    dataset.mkdir(parents=True)
    for split, numbers in splits.items():
        extra = [900, 901] if split == "test" else []
        images = [
            f"{n}\t{base64.b64encode(encoded(make_image(n, (40, 40)), 'PNG')).decode()}"
            for n in [*numbers, *extra]
        ]
        (dataset / f"{split}_imgs.tsv").write_text("\n".join(images) + "\n", encoding="utf-8")
        texts = [{"text_id": n, "text": CAPTIONS[n], "image_ids": [n]} for n in numbers]
        if split == "test":
            texts.append({"text_id": 999, "text": "没有图片", "image_ids": []})
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        (dataset / f"{split}_texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def muge(tmp_path_factory):
    """Return a folder in the official layout, with its LMDBs; its test split has two images
    without a text, and a text without an image."""
    dataset = tmp_path_factory.mktemp("muge") / "MUGE"
    write_official(dataset, SPLITS)
    line = ["--data_dir", str(dataset), "--splits", ",".join(SPLITS)]
    assert guarded(build_lmdb_dataset.main, line) == 0
    return dataset


@pytest.fixture
def datapath(tmp_path, muge, small_official):
    """Return the folder that the run_scripts call DATAPATH."""
    shutil.copytree(muge, tmp_path / "datasets" / "MUGE")
    (tmp_path / "pretrained_weights").mkdir()
    weights.save_official(small_official, tmp_path / "pretrained_weights" / "clip_cn_vit-b-16.pt")
    return tmp_path


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def finetune_line(datapath, name, *more):
    """The arguments of muge_finetune_vit-b-16_rbt-base.sh, with a batch of 8 and one epoch."""
    muge = datapath / "datasets" / "MUGE" / "lmdb"
    return (
        f"""
        --train-data={muge}/train --val-data={muge}/valid
        --resume={datapath}/pretrained_weights/clip_cn_vit-b-16.pt
        --reset-data-offset --reset-optimizer
        --logs={datapath}/experiments/ --name={name}
        --save-step-frequency=999999 --save-epoch-frequency=1 --log-interval=1
        --report-training-batch-acc
        --context-length=52 --warmup=100 --batch-size=8 --valid-batch-size=8
        --valid-step-interval=150 --valid-epoch-interval=1 --accum-freq=1
        --lr=5e-5 --wd=0.001 --max-epochs=1
        --vision-model=ViT-B-16 --mask-ratio=0 --use-augment
        --text-model=RoBERTa-wwm-ext-base-chinese --num-workers=0
    """.split()
        + list(more)
    )


def test_lmdbs_hold_the_pairs_and_every_image(script, datapath):
    line = f"--data_dir {datapath}/datasets/MUGE --splits train,valid,test"
    code, out, err = script(build_lmdb_dataset, *line.split())  # over its own files
    assert (code, err) == (0, "") and "12 pairs and 14 images of test" in out
    root = datapath / "datasets" / "MUGE" / "lmdb"
    for split, numbers in SPLITS.items():
        source = open_source(f"lmdb:{root / split}")
        pairs = {(source.row(n).image_id, source.row(n).text) for n in range(len(source))}
        assert pairs == {(str(n), CAPTIONS[n]) for n in numbers}
        assert source.unmatched() == []
    (root / "test" / "mine.txt").touch()
    code, _, err = script(build_lmdb_dataset, *line.split())
    assert code == 2 and "mine.txt, not written by" in err


def test_every_script_of_a_retrieval_benchmark_runs(script, datapath):
    """The README of the official package, section by section, on the split ``test``."""
    data = datapath / "datasets" / "MUGE"
    checkpoint = datapath / "pretrained_weights" / "clip_cn_vit-b-16.pt"
    code, _out, err = script(
        extract_features, "--extract-image-feats", "--extract-text-feats",
        f"--image-data={data}/lmdb/test/imgs", f"--text-data={data}/test_texts.jsonl",
        "--img-batch-size=32", "--text-batch-size=32", "--context-length=52",
        f"--resume={checkpoint}", "--vision-model=ViT-B-16",
        "--text-model=RoBERTa-wwm-ext-base-chinese",
    )  # fmt: skip
    assert (code, err) == (0, "")
    images, texts = (lines_of(data / f"test_{n}_feat.jsonl") for n in ("imgs.img", "texts.txt"))
    assert [row["image_id"] for row in images] == sorted([*SPLITS["test"], 900, 901], key=str)
    assert [row["text_id"] for row in texts] == [*SPLITS["test"], 999]
    embedder = cn_clip.load(checkpoint)
    expected = embedder.embed_images([make_image(row["image_id"], (40, 40)) for row in images])
    np.testing.assert_allclose([row["feature"] for row in images], expected, atol=1e-5)

    feats = f"--image-feats={data}/test_imgs.img_feat.jsonl"
    feats = [feats, f"--text-feats={data}/test_texts.txt_feat.jsonl", "--top-k=10"]
    for module, out_name in (
        (make_topk_predictions, "test_predictions.jsonl"),
        (make_topk_predictions_tr, "test_tr_predictions.jsonl"),
    ):
        code, _, err = script(
            module, *feats, "--eval-batch-size=32768", f"--output={data}/{out_name}"
        )
        assert (code, err) == (0, "")
    cosines = np.array([t["feature"] for t in texts]) @ np.array([i["feature"] for i in images]).T
    best = lines_of(data / "test_predictions.jsonl")
    for row, prediction in enumerate(best):
        order = np.argsort(-cosines[row], kind="stable")[:10]
        assert prediction["image_ids"] == [images[n]["image_id"] for n in order]

    code, _, err = script(transform_ir_annotation_to_tr, "--input", f"{data}/test_texts.jsonl")
    assert (code, err) == (0, "")
    assert lines_of(data / "test_texts.tr.jsonl") == [
        {"image_id": n, "text_ids": [n]} for n in SPLITS["test"]
    ]
    for module, truth, predictions in (
        (evaluation, "test_texts.jsonl", "test_predictions.jsonl"),
        (evaluation_tr, "test_texts.tr.jsonl", "test_tr_predictions.jsonl"),
    ):
        code, _out, err = script(module, data / truth, data / predictions, datapath / "output.json")
        assert (code, err) == (0, "")
        written = json.loads((datapath / "output.json").read_text())
        assert written["success"] is True and 0 <= written["score"] <= 100


@pytest.mark.parametrize("direction", ["", "tr_"])
def test_the_evaluators_write_what_the_official_ones_wrote(script, tmp_path, direction):
    golden = GOLDEN / "eval"
    module = evaluation_tr if direction else evaluation
    truth = golden / ("texts.tr.jsonl" if direction else "texts.jsonl")
    out = tmp_path / "out.json"
    assert script(module, truth, golden / f"{direction}predictions.jsonl", out)[0] == 0
    expected = json.loads((golden / f"{direction}output.json").read_text())
    written = json.loads(out.read_text())
    assert written["scoreJson"] == pytest.approx(expected["scoreJson"])
    assert script(transform_ir_annotation_to_tr, "--input", truth)[0] in (0, 1, 2)


def test_turned_annotations_are_the_official_ones(script, tmp_path):
    (tmp_path / "texts.jsonl").write_bytes((GOLDEN / "eval" / "texts.jsonl").read_bytes())
    assert script(transform_ir_annotation_to_tr, "--input", tmp_path / "texts.jsonl")[0] == 0
    assert lines_of(tmp_path / "texts.tr.jsonl") == lines_of(GOLDEN / "eval" / "texts.tr.jsonl")


def test_a_failed_evaluation_writes_the_official_failure_and_exits_with_1(script, tmp_path):
    golden, out = GOLDEN / "eval", tmp_path / "out.json"
    for predictions, words in (
        ("tr_predictions.jsonl", "of the other direction"),
        ("output.json", "expected"),
    ):
        code, _, err = script(evaluation, golden / "texts.jsonl", golden / predictions, out)
        assert code == 1 and words in err
        written = json.loads(out.read_text())
        assert written["success"] is False and words in written["errorMsg"]
    assert script(evaluation, golden / "texts.jsonl", golden / "predictions.jsonl", out)[0] == 0
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    code, _, err = script(
        evaluation, golden / "texts.jsonl", golden / "predictions.jsonl", tmp_path / "mine.json"
    )
    assert code == 2 and "was not written by" in err


def test_the_finetuning_line_trains_into_logs_name_and_its_checkpoint_is_official(script, datapath):
    code, out, err = script(training, *finetune_line(datapath, "muge_finetune"))
    assert code == 0, err
    run = datapath / "experiments" / "muge_finetune"
    assert "3 steps" in out and (run / "report.html").is_file()
    recipe = (run / "recipe.toml").read_text(encoding="utf-8")
    for line in ("global_batch_size = 8", "weight_decay = 0.001", "seed = 123", "flip = true"):
        assert line in recipe
    latest = run / "checkpoints" / "epoch_latest.pt"
    state = torch.load(latest, weights_only=True)["state_dict"]
    final = weights.read(run / "final").tensors
    assert {name.removeprefix("module.") for name in state} == set(final)
    # The same line again finds the run finished; a checkpoint of its own resumes it.
    assert script(training, *finetune_line(datapath, "muge_finetune"))[0] == 0
    data = datapath / "datasets" / "MUGE"
    code, _, err = script(
        extract_features, "--extract-text-feats", f"--text-data={data}/valid_texts.jsonl",
        f"--resume={latest}", "--vision-model=ViT-B-16",
        "--text-model=RoBERTa-wwm-ext-base-chinese", "--precision=fp32",
    )  # fmt: skip
    assert code == 0 and len(lines_of(data / "valid_texts.txt_feat.jsonl")) == 12


@pytest.mark.parametrize(
    "more",
    [
        ["--mask-ratio=0.5", "--use-flash-attention", "--grad-checkpointing"],
        pytest.param(
            ["--freeze-vision", "--use-bn-sync", "--gather-with-grad", "--skip-scheduler"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["--accum-freq=2", "--batch-size=4", "--precision", "fp32", "--debug"],
            marks=pytest.mark.full,
        ),
    ],
    ids=["flip and flash attention", "frozen", "accumulated"],
)
def test_the_other_finetuning_lines_train(script, datapath, more):
    line = finetune_line(datapath, "other", *more, "--max-steps=1")
    code, out, err = script(training, *line)
    assert code == 0 and "1 steps" in out, err


@pytest.mark.full
def test_the_distillation_line_trains_with_any_teacher(script, datapath):
    teacher = datapath / "pretrained_weights" / "clip_cn_vit-b-16.pt"
    more = ["--distillation", f"--teacher-model-name={teacher}", "--kd_loss_weight=0.5"]
    line = finetune_line(datapath, "distilled", *more, "--max-steps=1")
    assert script(training, *line)[0] == 0


def test_without_a_checkpoint_the_towers_and_their_optimizer_are_the_official_defaults(
    script, datapath
):
    lmdb = datapath / "datasets" / "MUGE" / "lmdb"
    line = f"--train-data={lmdb}/train --logs={datapath}/logs --max-steps=1 --batch-size=8"
    code, _, err = script(training, *line.split(), "--num-workers=0")
    assert code == 0, err
    recipe = (datapath / "logs" / "train_clip" / "recipe.toml").read_text(encoding="utf-8")
    for words in ("learning_rate = 0.0005", "beta2 = 0.98", "eps = 1e-06", "weight_decay = 0.2"):
        assert words in recipe


@pytest.mark.full
def test_two_names_in_one_folder_of_logs_are_two_runs(script, datapath):
    for name in ("first", "second"):
        assert script(training, *finetune_line(datapath, name, "--max-steps=1"))[0] == 0
        assert (datapath / "experiments" / name / "final").is_dir()


def test_zeroshot_evaluation_writes_the_submission(script, datapath):
    root = write_labelled(datapath / "datasets" / "mine")
    (datapath / "save_predictions").mkdir()
    (root / "order.json").write_text("[5, 4, 3, 2, 1, 0]")
    line = f"""
        --datapath={root}/test --label-file={root}/label_cn.txt
        --save-dir={datapath}/save_predictions --dataset=mine --index=
        --img-batch-size=64 --resume={datapath}/pretrained_weights/clip_cn_vit-b-16.pt
        --vision-model=ViT-B-16 --text-model=RoBERTa-wwm-ext-base-chinese
    """.split()
    code, out, err = script(zeroshot_evaluation, *line)
    assert (code, err) == (0, "") and "zeroshot-top1: " in out
    out_file = datapath / "save_predictions" / "mine.json"
    written = json.loads(out_file.read_text())
    assert written["model_name"] == "CN-CLIP-ViT-B-16" and written["dataset_name"] == "mine"
    rows = np.array(written["predictions"][0])
    assert rows.shape == (6, 3)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)
    assert script(zeroshot_evaluation, *line, f"--index={root}/order.json")[0] == 0
    turned = np.array(json.loads(out_file.read_text())["predictions"][0])
    np.testing.assert_array_equal(turned, rows[::-1])


@pytest.mark.full
def test_pytorch_to_onnx_writes_the_official_files(script, datapath):
    import onnxruntime

    prefix = datapath / "deploy" / "vit-b-16"
    line = f"""
        --model-arch ViT-B-16 --pytorch-ckpt-path {datapath}/pretrained_weights/clip_cn_vit-b-16.pt
        --save-onnx-path {prefix} --convert-text --convert-vision
    """.split()
    for _again in range(2):
        code, _out, err = script(pytorch_to_onnx, *line)
        assert code == 0, err
    names = [f"vit-b-16.{t}.{p}.onnx" for t in ("img", "txt") for p in ("fp16", "fp32")]
    assert sorted(path.name for path in prefix.parent.glob("*.onnx")) == names
    session = onnxruntime.InferenceSession(f"{prefix}.txt.fp32.onnx")
    ids = cn_clip.load(datapath / "pretrained_weights" / "clip_cn_vit-b-16.pt").tokenize(["猫"])
    (features,) = session.run(["unnorm_text_features"], {"text": ids.numpy()})
    assert features.shape == (1, 32)


@pytest.mark.parametrize(
    ("module", "line", "code", "words"),
    [
        (build_lmdb_dataset, "--data_dir none --splits train", 2, "--data_dir none is not a"),
        (build_lmdb_dataset, "--data_dir . --splits train", 2, "no such file: train_imgs.tsv"),
        (build_lmdb_dataset, "--data_dir . --splits ,", 2, "--splits names no split"),
        (build_lmdb_dataset, "--splits train", 2, "--data_dir"),
        (extract_features, "--resume x.pt", 2, "nothing to extract"),
        (extract_features, "--extract-text-feats", 2, "--resume"),
        (extract_features, "--extract-text-feats --resume none.pt", 2, "none.pt"),
        (extract_features, "--extract-text-feats --resume x --precision bf8", 2, "bf8"),
        (extract_features, "--extract-text-feats --resume x --vision-model ViT-B-16", 2, "both"),
        (make_topk_predictions, "--image-feats a --text-feats b", 2, "--output"),
        (make_topk_predictions, "--image-feats a.jsonl --text-feats b.jsonl --output c.jsonl",
         2, "no embeddings at a.jsonl"),
        (evaluation, "a.jsonl", 2, "predictions"),
        (evaluation_tr, "a.jsonl b.jsonl out.json", 1, "b.jsonl"),
        (transform_ir_annotation_to_tr, "--input none.jsonl", 1, "none.jsonl"),
        (zeroshot_evaluation, "--datapath none --label-file none --resume x", 1, "none"),
        (pytorch_to_onnx, "--model-arch ViT-B-16 --save-onnx-path x", 2, "nothing to convert"),
        (pytorch_to_onnx, "--model-arch ViT-B-61 --save-onnx-path x", 2, "ViT-B-61"),
        (training, "", 2, "no training data"),
        (training, "--train-data=csv:none.csv", 1, "none.csv"),
        (training, "--train-data=x --lr=fast", 2, "fast"),
        (training, "--train-data=x --learning-rat=1", 2, "did you mean"),
        (training, "--train-data=x --resume", 2, "--resume needs a value"),
        (training, "--train-data=csv:x.csv --vision-model=ViT-B-61", 2, "ViT-B-61"),
        (training, "--train-data=x --logs=None", 2, "--logs is None"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(script, tmp_path, monkeypatch, module, line, code, words):
    monkeypatch.chdir(tmp_path)
    exit_code, _, err = script(module, *line.split())
    assert exit_code == code and words in err
    assert err.startswith("cn-clip: ") and err.count("\n") == 1


def python(*arguments, folder, **variables):
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_script_runs_as_a_module_and_as_a_file_with_the_official_pythonpath(tmp_path):
    golden = GOLDEN / "eval"
    arguments = [golden / "texts.jsonl", golden / "predictions.jsonl", tmp_path / "out.json"]
    # export PYTHONPATH=${PYTHONPATH}:`pwd`/cn_clip, in the folder above cn_clip
    path = os.pathsep.join(map(str, (SOURCE.parent, SOURCE)))
    for done in (
        python("-m", "cn_clip.eval.evaluation", *arguments, folder=tmp_path),
        python("-u", "cn_clip/eval/evaluation.py", *arguments, folder=SOURCE.parent),
        python("cn_clip/eval/evaluation.py", *arguments, folder=SOURCE.parent, PYTHONPATH=path),
    ):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("R@1 ")
    done = python("-m", "cn_clip.eval.evaluation", "--help", folder=tmp_path)
    assert done.returncode == 0 and "cn-clip eval predictions" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "launch",
    [
        # Without --, the launcher takes --logs for an abbreviation of its own options.
        "-m torch.distributed.run --nproc-per-node=2 -m -- cn_clip.training.main",
        "-m torch.distributed.launch --use_env --nproc_per_node=2 -- cn_clip/training/main.py",
        "cn_clip/training/main.py",
    ],
    ids=["torchrun", "torch.distributed.launch", "python"],
)
def test_training_starts_as_the_run_scripts_start_it(script, datapath, launch):
    towers = ("--vision-model", "--text-model", "--mask-ratio", "--num-workers")
    line = [a for a in finetune_line(datapath, "run") if not a.startswith(towers)]
    path = os.pathsep.join(map(str, (SOURCE.parent, SOURCE)))
    done = python(*launch.split(), *line, "--max-steps=2", folder=SOURCE.parent, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert (datapath / "experiments" / "run" / "checkpoints" / "epoch_latest.pt").is_file()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="as measured with Python 3.11")
def test_the_launcher_takes_logs_for_its_own_option_unless_the_script_follows_dashes(capsys):
    from torch.distributed.run import parse_args

    line = ["cn_clip.training.main", "--logs=experiments/", "--name=muge"]
    with pytest.raises(SystemExit):
        parse_args(["-m", *line])
    assert "ambiguous option: --logs" in capsys.readouterr().err
    given = parse_args(["-m", "--", *line])
    assert [given.training_script, *given.training_script_args] == line


def test_annotations_are_never_replaced_by_predictions(script, tmp_path):
    rows = [{"image_id": n, "feature": [1.0, n]} for n in range(12)]
    text = [{"text_id": n, "feature": [1.0, n]} for n in range(3)]
    for name, lines in (("i.jsonl", rows), ("t.jsonl", text)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotations = tmp_path / "texts.jsonl"
    annotations.write_bytes((GOLDEN / "eval" / "texts.jsonl").read_bytes())
    feats = ["--image-feats", tmp_path / "i.jsonl", "--text-feats", tmp_path / "t.jsonl"]
    code, _, err = script(make_topk_predictions, *feats, "--output", annotations)
    assert code == 2 and "was not written by" in err
    assert annotations.read_bytes() == (GOLDEN / "eval" / "texts.jsonl").read_bytes()
    for module in (make_topk_predictions, make_topk_predictions_tr, make_topk_predictions):
        assert script(module, *feats, "--output", tmp_path / "p.jsonl")[0] == 0
    official = GOLDEN / "eval" / "predictions.jsonl"
    (tmp_path / "p.jsonl").write_bytes(official.read_bytes())
    assert script(make_topk_predictions, *feats, "--output", tmp_path / "p.jsonl")[0] == 0


@pytest.mark.full
def test_the_commands_of_the_migration_page_run(script, tmp_path, small_official, monkeypatch):
    """In this process, so that ViT-B-16 is a tiny model; torchrun is tested above."""
    page = next(ROOT.glob("docs/migrating.md"), ROOT / "docs" / "migrating.md")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = (block for block in blocks if "cn_clip.training.main" in block)
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "datasets" / "MUGE", SPLITS | {"train": range(130)})
    weights.save_official(small_official, tmp_path / "clip_cn_vit-b-16.pt")
    commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        (at,) = (n for n, word in enumerate(words) if word.startswith("cn_clip."))
        code, _out, err = script(importlib.import_module(words[at]), *words[at + 1 :])
        assert code == 0, err
    assert (tmp_path / "datasets" / "MUGE" / "valid_imgs.img_feat.jsonl").is_file()
