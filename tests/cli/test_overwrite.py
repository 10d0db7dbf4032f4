"""No command touches what it did not write: every command with every output option."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from conftest import TINY, make_image, make_model
from eval.labelled_folder import write_labelled
from shards.shard_folders import clustered, write_shards
from train.runs import CAPTIONS, recipe_values

from cn_clip import weights
from cn_clip.cli import app, run
from cn_clip.shards.building import build_index
from cn_clip.train.recipe import schema as recipes

# Options of strings that are not outputs; --download-root receives files, but replaces none, and
# --library takes a library or a new folder, see tests/search; --keys gets lines added, see
# tests/serve.
READ = {
    "--after", "--base", "--before", "--caption", "--collection", "--exclude", "--folder",
    "--host", "--image", "--keys", "--new-key", "--include", "--library", "--like", "--max-size",
    "--keep", "--min-size", "--parts", "--shards", "--text", "--within",
    "EMBEDDINGS", "FOLDER", "MODEL", "NEW",
    "OLD", "OTHER", "PATHS", "QUERY", "SOURCES",
    "--against", "--calibration", "--compare", "--data", "--dataset", "--device",
    "--download-root", "--images", "--labels", "--labels-file", "--model", "--normalize",
    "--recipe", "--resume", "--split", "--template", "--templates", "--texts", "--truth",
    "--without", "FLAGS", "IMAGES", "INPUTS", "NAME", "PREDICTIONS", "SOURCE",
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """A way to call a command that writes to ``{out}``, in a folder of inputs."""

    words: str
    suffix: str = ""
    attacked: str = "photos"  # the input
    code: int = 0

    @property
    def arguments(self) -> list[str]:
        return self.words.split()

    @property
    def option(self) -> str:
        before = self.arguments[self.arguments.index("{out}") - 1]
        return before if before.startswith("--") else "OUT"

    @property
    def command(self) -> str:
        words = self.arguments
        return " ".join(words[: 2 if words[0] in ("bulk", "data", "eval", "library") else 1])


MODEL = "--model model --device cpu"
TRAIN = "train --recipe project/recipe.toml"
OUTPUTS = [
    Output(f"embed images photos --out {{out}} {MODEL} --overwrite", ".npz"),
    Output(f"embed images photos --out {{out}} {MODEL} --overwrite", ".jsonl"),
    Output(f"embed images photos --out {{out}} {MODEL} --overwrite"),
    Output("convert model {out} --to official --overwrite", ".pt", "model"),
    Output("convert model {out} --to hf --overwrite", "", "model"),
    Output("convert model {out} --to safetensors --overwrite", "", "model"),
    Output("data pack photos --out {out} --workers 0 --overwrite"),
    Output("data pack photos --out {out} --to tsv --workers 0 --overwrite"),
    Output("data pack photos --out {out} --to lmdb --workers 0 --overwrite"),
    Output("data check photos --report {out} --workers 0", ".html"),
    Output(
        "data decontaminate photos --against test --out {out} --workers 0 --overwrite", ".jsonl"
    ),
    Output(
        "data decontaminate photos --against test --out OTHER --report {out} --workers 0 "
        "--overwrite",
        ".html",
    ),
    Output(f"{TRAIN} --output.folder {{out}}"),
    Output(f"{TRAIN} --output.folder OTHER --output.features {{out}}"),
    Output(f"eval retrieval --data photos --out {{out}} {MODEL}"),
    Output(
        f"eval zeroshot --data pets --dataset pets --submission {{out}} {MODEL}", ".json", "pets"
    ),
    Output(
        "eval predictions predictions.jsonl --truth truth.jsonl --out {out}", ".json", "truth.jsonl"
    ),
    Output(f"eval calibrate --data photos --out {{out}} {MODEL[:-13]} --overwrite", ".json"),
    Output(
        f"eval calibrate --data photos --out OTHER --report {{out}} {MODEL[:-13]} --overwrite",
        ".html",
    ),
    Output(f"eval diagnose --data photos --report {{out}} {MODEL}", ".html"),
    Output("export --model model --out {out} --overwrite", "", "model"),
    Output(f"search 海边 --library ./library --out {{out}} {MODEL}", ".html", "library"),
    Output("library backup --library ./library --out {out} --overwrite", "", "library"),
    Output(
        "library export --library ./library --to npz --out {out} --overwrite", ".npz", "library"
    ),
    Output(
        "library export --library ./library --to clip-retrieval --out {out} --overwrite",
        "",
        "library",
    ),
    Output(
        "library export --library ./library --to parquet --out {out} --overwrite",
        ".parquet",
        "library",
    ),
    Output("bulk filter shards --min-cosine 0 --workers 0 --out {out} --overwrite", ".jsonl",
           "shards"),
    Output("bulk dedupe shards --workers 0 --out {out} --overwrite", ".jsonl", "shards"),
]  # fmt: skip
every_output = pytest.mark.parametrize(
    "output", OUTPUTS, ids=lambda o: o.words.partition(" --w")[0]
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder of all inputs of the commands."""
    root = tmp_path_factory.mktemp("inputs")
    for folder, numbers in (("photos", range(12)), ("test", range(20, 24))):
        (root / folder / "album").mkdir(parents=True)
        for n in numbers:
            make_image(n, (40, 40)).save(root / folder / f"{n}.jpg")
            (root / folder / f"{n}.txt").write_text(CAPTIONS[n], encoding="utf-8")
        (root / folder / "album" / "diary").write_text("mine")
    weights.save_folder(make_model(TINY["vit"]), root / "model")
    write_labelled(root / "pets")
    ids = list(range(12))
    rows = [{"text_id": n, "image_ids": ids[n:] + ids[:n]} for n in ids]
    (root / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"text_id": n, "image_ids": [n]} for n in ids]
    (root / "truth.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = (f"folder:{root}/photos", f"folder:{root}/test")
    stage = {"epochs": None, "steps": 1, "global_batch_size": 4, "freeze": ["visual.*"]}
    values = recipe_values(pairs, root / "model", "run", stage | {"cached": True})
    del values["stages"][0]["epochs"]
    words = ["index", f"{root}/photos", "--library", f"{root}/library"]
    assert run([*words, "--model", f"{root}/model", "--device", "cpu"]) == 0
    vectors = clustered(20)
    write_shards(root / "shards", vectors, 8, text_emb=vectors)
    build_index(root / "shards", lambda: vectors)
    (root / "project").mkdir()
    (root / "project" / "recipe.toml").write_text("# my notes\n" + tomli_w.dumps(values))
    return root


@pytest.fixture
def command(
    inputs, tiny_export, tmp_path, monkeypatch, capsys
) -> Callable[[Output, object], tuple[int, str]]:
    """Run a command with an output, in the folder of inputs; return its code and stderr."""
    from cn_clip import export
    from cn_clip.eval import embedded_dataset, zeroshot

    known = {"pets": zeroshot.DatasetInfo()}
    monkeypatch.setattr(zeroshot, "datasets", lambda: known)
    vectors = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = np.stack([np.arange(60)] * 2, axis=1)
    embedded = SimpleNamespace(images=vectors, texts=vectors, pairs=pairs, digest="d", failed=[])
    # The cosines of an untrained model are refused by the calibration.
    monkeypatch.setattr(embedded_dataset, "embed_pairs", lambda *_, **__: embedded)
    monkeypatch.setattr(export, "write_graphs", lambda *args: copy_graphs(tiny_export, args[1]))
    monkeypatch.chdir(inputs)

    def call(output: Output, out: object, *more: str) -> tuple[int, str]:
        other = str(tmp_path / "other")
        words = {"{out}": str(out), "OTHER": other}
        code = run([words.get(word, word) for word in output.arguments] + list(more))
        return code, capsys.readouterr().err

    return call


def copy_graphs(known: Path, folder: Path) -> None:
    """Copy the graphs of an export of the same model, which is faster than to trace it."""
    for file in known.glob("*.onnx*"):
        shutil.copy(file, folder)


def errors(err: str) -> list[str]:
    """The lines on stderr, without the warning that a folder holds files of other formats."""
    return [line for line in err.splitlines() if not line.startswith("cn-clip: warning: ")]


def contents(*roots: Path) -> dict[str, object]:
    """Every file, link and folder, with its bytes or link target, and its inode."""
    found: dict[str, object] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            content = os.readlink(path) if path.is_symlink() else None
            if content is None and path.is_file():
                content = path.read_bytes()
            found[str(path)] = (content, path.lstat().st_ino)
    return found


def text_options() -> set[tuple[str, str]]:
    """(command, option) of every string option of every command."""

    def walk(group, path):
        for name in group:
            if name.startswith("-"):
                continue
            inner = group[name]
            if any(not each.startswith("-") for each in inner):
                yield from walk(inner, (*path, name))
                continue
            for argument in inner.assemble_argument_collection():
                if "str" in str(argument.hint) and "Literal" not in str(argument.hint):
                    yield " ".join((*path, name)), argument.name

    return set(walk(app, ()))


def test_every_option_that_may_be_an_output_is_in_these_tests():
    options = {(command, option) for command, option in text_options() if option not in READ}
    of_train = {
        ("train", f"--{name}")
        for name, kind, _, _ in recipes.options()
        if name.startswith("output.") and "str" in str(kind)
    }
    assert options | of_train == {(each.command, each.option) for each in OUTPUTS}


def test_every_source_of_a_recipe_is_known_as_an_input(tmp_path):
    """A new option of [data] fails this test until it is handled."""
    from cn_clip.train.run.run_dir import _inputs

    hints = {n: k for n, k, _, _ in recipes.options() if n.startswith("data.") and "str" in str(k)}
    for name in hints:
        given = tmp_path / f"{name}.csv"
        option = name.removeprefix("data.")
        recipe = recipes.Recipe(data=recipes.Data(**{option: (f"0.5@csv:{given}",)}))
        assert given in _inputs(recipe), name


def foreign(output: Output, place: Path) -> Path:
    """Create a user's file or folder at the output path."""
    out = place / f"mine{output.suffix}"
    if output.suffix:
        out.write_text("mine")
    else:
        (out / "album").mkdir(parents=True)
        (out / "album" / "diary").write_text("mine")
    return out


@every_output
def test_files_of_others_are_not_touched(output, inputs, command, tmp_path):
    photos, outs = inputs / output.attacked, tmp_path / "outs"
    outs.mkdir()
    (outs / "to-input").symlink_to(photos)
    (outs / "a-file").write_text("mine")
    hard = outs / f"hard{output.suffix}"
    files = [photos] if photos.is_file() else photos.glob("*.*")
    os.link(next(file for file in files if file.stat().st_size), hard)  # no empty lock file
    places = {
        "the input": photos,
        "inside the input": photos / f"new{output.suffix}",
        "inside, deeper": photos / "a" / "b" / f"new{output.suffix}",
        "the folder that contains the input": inputs,
        "the current folder": ".",
        "above the current folder": "..",
        "a link to the input": outs / "to-input",
        "through a link": outs / "to-input" / f"new{output.suffix}",
        "with dots": f"{photos}/../{photos.name}/new{output.suffix}",
        "another's": foreign(output, outs),
        "a hard link to an input": hard,
        "below a file": outs / "a-file" / f"new{output.suffix}",
        "too long a name": outs / f"{'长' * 90}{output.suffix}",
        "below too long a name": outs / ("x" * 300) / f"new{output.suffix}",
        "no name": "",
        "the null device": os.devnull,
    }
    before = contents(inputs, outs)
    for name, place in places.items():
        code, err = command(output, place)
        assert (code, len(errors(err))) == (2, 1), f"{name}: {err}"
        assert err.startswith("cn-clip: "), name
        assert contents(inputs, outs) == before, f"{name}: {err}"
    named = output.option if output.option.startswith("-") else "argument 3"
    assert named in command(output, "")[1]
    assert not (tmp_path / "other").exists()


@every_output
def test_a_command_replaces_only_its_own_files(output, inputs, command, tmp_path):
    before, out = contents(inputs), tmp_path / "outs" / f"out{output.suffix}"
    for _ in range(2):
        if output.command == "train":
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
        code, err = command(output, out, *(["--resume", "auto"] * (output.command == "train")))
        assert code == output.code, err
        assert out.exists() and contents(inputs) == before
    beside = [each.name for each in out.parent.iterdir() if each != out]
    assert beside in ([], [f"{out.name}.about.json"])
    diary = out / "diary" if out.is_dir() else out
    diary.write_text("mine")
    unchanged = contents(out.parent)
    code, err = command(output, out)
    assert (code, len(errors(err))) == (2, 1), err
    assert contents(out.parent) == unchanged and contents(inputs) == before


@pytest.mark.parametrize("kind", ["npz", "jsonl", "folder"])
def test_parts_that_embed_did_not_write_are_not_touched(kind, command, tmp_path):
    out = tmp_path / ("out" if kind == "folder" else f"out.{kind}")
    parts = tmp_path / f"{out.name}.parts"
    parts.mkdir()
    for name in ("000000.npz", "about.json", "notes.txt"):
        (parts / name).write_text("{}")
        before = contents(parts)
        code, err = command(OUTPUTS[0], out)
        assert code == 2 and f".parts holds {name}, not written by embed" in err
        assert contents(parts) == before
        (parts / name).unlink()


def test_the_companion_of_a_jsonl_is_not_touched_either(command, tmp_path):
    (tmp_path / "out.jsonl.about.json").write_text('{"mine": 1}')
    code, err = command(OUTPUTS[1], tmp_path / "out.jsonl")
    assert code == 2 and "out.jsonl.about.json was not written by `cn-clip embed`" in err


def test_overwriting_shards_leaves_the_users_own_tar_and_json(command, tmp_path):
    pack = OUTPUTS[6]
    assert command(pack, tmp_path / "out")[0] == 0
    for name in ("mine.tar", "00007.tar", "00000.json", "labels.json"):
        (tmp_path / "out" / name).write_text("mine")
        before = contents(tmp_path / "out")
        code, err = command(pack, tmp_path / "out")
        assert code == 2 and f"holds {name}, not written by pack" in err
        assert contents(tmp_path / "out") == before
        (tmp_path / "out" / name).unlink()
    assert command(pack, tmp_path / "out")[0] == 0


def test_pack_runs_again_after_kill_9(command, tmp_path):
    """Empty temporary folders, of this version and of earlier ones."""
    pack = OUTPUTS[6]
    for name in ("..plan.json.abcdefgh", "..plan.json.abcdefgh.cn-clip-tmp"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / ".lock").touch()
        words = Output(pack.words.removesuffix(" --overwrite"))
        for each in (words, pack):
            code, err = command(each, tmp_path / name)
            assert code == 0, err
        assert sorted(os.listdir(tmp_path / name)) == ["00000.tar", "manifest.json"]


def test_a_hidden_folder_of_the_users_is_no_leftover(command, tmp_path):
    for name in (".git.original", ".venv.abcdefgh"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "x").write_text("precious")
        code, err = command(OUTPUTS[6], tmp_path / "out")
        assert code == 2 and f"holds {name}/x, not written by pack" in err
        shutil.rmtree(tmp_path / "out" / name)


def test_a_split_is_no_path(inputs, command, tmp_path):
    (tmp_path / "mine_imgs.tsv").write_text("mine")
    code, err = command(OUTPUTS[7], tmp_path / "out", "--split", f"{tmp_path}/mine")
    assert code == 2 and "is not a file name" in err
    assert (tmp_path / "mine_imgs.tsv").read_text() == "mine"


def test_a_first_run_in_a_projects_own_folder_is_refused(inputs, tmp_path, monkeypatch, capsys):
    for name in (".venv3.11", ".git.bak", "start", "final"):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "x").write_text("precious")
    (tmp_path / "p" / "outcome.json").write_text('{"mine": 1}')
    (tmp_path / "p" / "log.jsonl").write_text("mine")
    shutil.copy(inputs / "project" / "recipe.toml", tmp_path / "p" / "recipe.toml")
    monkeypatch.chdir(tmp_path / "p")
    before = contents(tmp_path)
    for recipe in ("recipe.toml", str(inputs / "project" / "recipe.toml")):
        assert run(["train", "--recipe", recipe, "--output.folder", "."]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert contents(tmp_path) == before


def test_a_run_resumes_with_other_files_in_its_folder_and_its_own_recipe(command, tmp_path, capsys):
    train, out = next(each for each in OUTPUTS if "--output.folder {out}" in each.words), "run"
    out = tmp_path / "run"
    assert command(train, out, "--resume", "auto")[0] == 0
    (out / "notes.txt").write_text("mine")
    words = ["train", "--recipe", str(out / "recipe.toml"), "--output.folder", str(out)]
    assert run([*words, "--resume", "auto"]) == 0
    assert run([*words, "--resume", "auto", "--allow-changes", "--steps", "2"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "final" / "README.md").write_text("mine")
    capsys.readouterr()
    assert run([*words, "--resume", "auto", "--allow-changes", "--steps", "3"]) == 1
    assert "final has other files too" in capsys.readouterr().err
    assert (out / "final" / "README.md").read_text() == "mine"


def test_the_same_path_for_two_outputs_is_refused(command, tmp_path):
    for words in ("data decontaminate photos --against test", "eval calibrate --data photos"):
        output = Output(f"{words} --out {{out}} --report {{out}}")
        code, err = command(output, tmp_path / "x.html")
        assert code == 2 and "--out and --report are both" in err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no links without rights")
def test_a_link_to_a_former_output_is_written_through(command, tmp_path):
    (tmp_path / "disk").mkdir()
    for output in (OUTPUTS[0], OUTPUTS[2]):
        link = tmp_path / f"link{output.suffix}"
        link.symlink_to(tmp_path / "disk" / f"real{output.suffix}")
        for _ in range(2):
            assert command(output, link)[0] == 0
        assert link.is_symlink() and (tmp_path / "disk" / f"real{output.suffix}").exists()


@pytest.mark.parametrize("name", ["data check", "eval diagnose", "eval retrieval", "data pack"])
def test_a_full_disk_is_one_sentence_and_the_old_output_stays(name, command, tmp_path, monkeypatch):
    import errno

    from cn_clip import outputs, publish

    output = next(each for each in OUTPUTS if each.command == name)
    out = tmp_path / f"out{output.suffix}"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(publish, "flush", full)
    monkeypatch.setattr(outputs, "flush", full)
    code, err = command(output, out)
    assert code == 1 and "No space left on device" in err and len(errors(err)) == 1
    assert not out.is_file()
