"""Recipes: what is shipped, what TOML says, and what is refused before anything is done."""

import math
import random
import re
import tomllib
from dataclasses import replace
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
from train.runs import from_toml

from cn_clip.config import MODELS, model_config
from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.install import update_command
from cn_clip.train.optim import peak_lr
from cn_clip.train.recipe.flags import apply_flags
from cn_clip.train.recipe.renamed import RENAMED
from cn_clip.train.recipe.schema import EarlyStoppingOptions, Recipe, options
from cn_clip.train.recipe.toml import build_recipe, difference, read_recipe, shipped

# run_scripts/*_finetune_vit-b-16_rbt-base.sh of the official repository: all on 8 GPUs, with
# ViT-B-16, RoBERTa-wwm-ext-base-chinese, --use-augment and --context-length 52.
SCRIPTS = {
    "finetune-muge": {"batch": 128, "lr": 5e-5, "warmup": 100, "epochs": 3, "every": 150},
    "finetune-flickr30k-cn": {"batch": 128, "lr": 5e-5, "warmup": 100, "epochs": 3, "every": 150},
    "finetune-coco-cn": {"batch": 1024, "lr": 3e-5, "warmup": 6, "epochs": 20, "every": None},
}
DATA = ["--train-data", "csv:train.csv", "--val-data", "csv:val.csv"]
STAGE = {"epochs": 1, "freeze": ["visual.*"]}
BASE = {"data": {"val": ["csv:val.csv"]}, "stages": [STAGE]}


def built(name, *flags):
    return build_recipe(apply_flags(read_recipe(name), [*DATA, *flags]))


def changed(**changes):
    """Values of a recipe with changes to its one stage, and to its tables."""
    tables = {k: changes.pop(k) for k in list(changes) if k in Recipe.__dataclass_fields__}
    return BASE | {"stages": [STAGE | changes]} | tables


def a_value(kind, default):
    """A text that sets an option to something that is not its default, and what it should be."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        return "bert.embeddings.*=0.5", ("bert.embeddings.*=0.5",)
    if get_origin(kind) is Literal:
        return get_args(kind)[-1], get_args(kind)[-1]
    value = {bool: not default, int: 7, float: 0.25, str: "other"}[kind]
    return str(value), value


def test_the_shipped_recipes_have_their_file_names():
    assert shipped() == [
        "distill",
        "finetune-coco-cn",
        "finetune-flickr30k-cn",
        "finetune-muge",
        "finetune-small",
        "mini",
        "two-stage",
    ]
    assert all(built(name).name == name for name in shipped())


@pytest.mark.parametrize("name", shipped())
def test_the_resolved_toml_of_a_shipped_recipe_reads_back_equal(name):
    recipe = built(name)
    assert from_toml(recipe.to_toml()) == recipe
    assert recipe.data.val == ("csv:val.csv",)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finetune_recipe_has_the_values_of_the_official_script(name):
    script, recipe = SCRIPTS[name], built(name)
    (stage,) = recipe.stages
    optimizer = stage.optimizer
    assert stage.global_batch_size == 8 * script["batch"]
    assert peak_lr(optimizer, 8 * script["batch"]) == script["lr"]
    assert (optimizer.warmup, optimizer.weight_decay) == (script["warmup"], 0.001)
    assert (stage.epochs, stage.steps) == (script["epochs"], None)
    assert (recipe.evaluation.every_steps, recipe.evaluation.every_epochs) == (script["every"], 1)
    assert stage.augment and optimizer.schedule == "cosine" and stage.freeze == ()
    # params.py: the defaults of ViT-B-16
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-6)
    config = MODELS[recipe.start.checkpoint]
    struct = model_config("ViT-B-16@RoBERTa-wwm-ext-base-chinese")
    assert replace(struct, name=config.name) == config and config.context_length == 52


def test_the_two_stages_are_those_of_the_paper():
    """Yang et al., arXiv:2211.01335: the image tower locked, then everything."""
    locked, unlocked = built("two-stage").stages
    assert locked.freeze == ("visual.*",) and unlocked.freeze == ()
    assert (locked.global_batch_size, unlocked.global_batch_size) == (32768, 16384)
    assert (locked.optimizer.learning_rate, unlocked.optimizer.learning_rate) == (1e-4, 2e-5)
    assert isinstance(locked.early_stopping, EarlyStoppingOptions) and isinstance(
        unlocked.early_stopping, EarlyStoppingOptions
    )


@pytest.mark.parametrize(
    ("name", "kind", "default"), [o[:3] for o in options() if o[0] != "version"]
)
def test_every_option_is_set_by_its_flag_and_read_back_from_toml(name, kind, default):
    text, expected = a_value(kind, default)
    # What means nothing without another option is refused alone.
    needed = {
        "data.keep_data": ["--interpolate", "auto"],
        "stages.NAME.flip": ["--augment", "true"],
        "stages.NAME.views": ["--augment", "true", "--cached", "true", "--freeze", "visual.*"],
        "stages.NAME.center_texts": ["--cached", "true", "--freeze", "visual.*"],
    }.get(name, [])
    values = apply_flags(BASE, [f"--{name}", text, *needed])
    recipe = build_recipe(values)
    found = recipe
    for part in name.split("."):
        found = found.stages if part == "stages" else getattr(found, part, found)
        found = found[0] if isinstance(found, tuple) and part == "stages" else found
    assert found == expected
    assert from_toml(recipe.to_toml()) == recipe
    assert difference(build_recipe(BASE), recipe)


def test_every_option_has_a_help_and_a_valid_default():
    assert all(told for _, _, _, told in options())
    assert build_recipe({"stages": [{"epochs": 1}]}).stages[0].global_batch_size == 128


def test_an_integer_is_accepted_as_a_float_and_a_string_as_a_list():
    recipe = build_recipe(changed(optimizer={"learning_rate": 1}, freeze="bert.*"))
    assert recipe.stages[0].optimizer.learning_rate == 1.0
    assert isinstance(recipe.stages[0].optimizer.learning_rate, float)
    assert recipe.stages[0].freeze == ("bert.*",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"date": {}}, "unknown option of the recipe 'date'; did you mean data?"),
        ({"data": {"trian": []}}, "unknown option of data 'trian'; did you mean train"),
        (changed(epoch=3), r"unknown option of stages\.0 'epoch'; did you mean epochs"),
        (changed(optimiser={}), "'optimiser'; did you mean optimizer"),
        (changed(optimizer={"learningrate": 1.0}), "'learningrate'; did you mean learning_rate"),
        (changed(loss={"kind": "clipp"}), "'clipp'; did you mean clip"),
        (changed(machine={"precision": "bf-16"}), "'bf-16'; did you mean bf16"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(values, said):
    with pytest.raises(UnknownNameError, match=said):
        build_recipe(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(epochs="3"), r"stages\.0\.epochs is '3'; expected a whole number"),
        (changed(epochs=2.5), r"epochs is 2\.5; expected a whole number"),
        (changed(epochs=True), "epochs is True; expected a whole number"),
        (changed(augment=1), "augment is 1; expected a true or false"),
        (changed(mask_ratio="half"), "mask_ratio is 'half'; expected a number"),
        (changed(freeze=3), "freeze is 3; expected a list of texts"),
        (changed(freeze=[3]), r"freeze\.0 is 3; expected a text"),
        (changed(early_stopping=3), "early_stopping is 3; expected a table"),
        (changed(data="csv:a.csv"), "data is 'csv:a.csv'; expected a table"),
        ({"stages": {"epochs": 1}}, "stages is .*; expected a list of tables"),
        ({"stages": ["finetune"]}, r"stages\.0 is 'finetune'; expected a table"),
        (changed(version="1"), "version is '1'; expected a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(values, said):
    with pytest.raises(UsageError, match=said):
        build_recipe(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(global_batch_size=1), r"stages\.train\.global_batch_size is 1; give 2 to"),
        (changed(epochs=0), r"stages\.train\.epochs is 0; give 1"),
        (changed(mask_ratio=1.0), "mask_ratio is 1.0; give 0 to 0.99"),
        (changed(views=0), "views is 0"),
        (changed(optimizer={"learning_rate": -1.0}), "learning_rate is -1"),
        (changed(optimizer={"learning_rate": float("nan")}), "learning_rate is nan"),
        (changed(optimizer={"layer_decay": 1.5}), "layer_decay is 1.5"),
        (changed(optimizer={"ema": 1.0}), "ema is 1.0"),
        (changed(optimizer={"max_grad_norm": 0.0}), "max_grad_norm is 0.0"),
        (changed(optimizer={"eps": -1e-6}), "eps is -1e-06"),
        (changed(lora={"rank": 0}), "lora.rank is 0; give 1"),
        (changed(early_stopping={"patience": 0}), "early_stopping.patience is 0; give 1"),
        (changed(loss={"teacher_weight": 2.0}), "teacher_weight is 2.0; give 0 to 1"),
        (changed(data={"max_skipped_fraction": 1.5}), "data.max_skipped_fraction is 1.5"),
        (changed(interpolate=1.5), r"stages\.train\.interpolate is 1.5; give 0 to 1"),
        (changed(loss={"text_targets_weight": -1.0}), "text_targets_weight is -1"),
        (changed(loss={"text_targets_batch_size": 0}), "text_targets_batch_size is 0; give 1"),
        (changed(output={"log_every": 0}), "output.log_every is 0"),
        (changed(evaluation={"every_epochs": -1}), "evaluation.every_epochs is -1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(values, said):
    with pytest.raises(UsageError, match=said):
        build_recipe(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(steps=5), "must have either epochs or steps"),
        ({"stages": [{}]}, "must have either epochs or steps"),
        ({"stages": []}, r"no stage; give it a table \[\[stages\]\]"),
        ({"stages": [STAGE, STAGE]}, "named train, train; give each its own name"),
        ({"stages": [STAGE | {"name": "a/b"}]}, "letters, digits and hyphens"),
        (changed(early_stopping={}, data={}), "no validation pairs; give --val-data"),
        (
            changed(early_stopping={}, evaluation={"every_epochs": 0}),
            "every_epochs is 0 and every_steps",
        ),
        (changed(cached=True, freeze=[]), r"add 'visual\.\*' to its freeze"),
        (changed(cached=True, mask_ratio=0.5), "mask_ratio has no effect"),
        (changed(cached=True, loss={"teacher": "ViT-H-14"}), "a teacher needs the images"),
        (changed(loss={"kind": "sigmoid", "teacher": "RN50"}), "set loss.teacher_features"),
    ],
)
def test_options_that_exclude_each_other_are_refused_with_the_remedy(values, said):
    with pytest.raises(UsageError, match=said):
        build_recipe(values)


@pytest.mark.parametrize("entry", ["visual.*", "=0.1", "visual.*=", "visual.*=low", "bert.*=-1"])
def test_an_invalid_lr_multiplier_is_refused(entry):
    said = f"lr_multipliers has the entry '{re.escape(entry)}'; give PATTERN=FACTOR, such as"
    with pytest.raises(UsageError, match=said):
        build_recipe(changed(optimizer={"lr_multipliers": ["bert.*=0.5", entry]}))


TABLES = {"most_skipped": "data", "plateau": ""} | {
    **dict.fromkeys(("for_batch", "clip_norm", "rates"), "optimizer"),
    **dict.fromkeys(("sentences", "sentences_weight", "sentences_batch_size"), "loss"),
}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_option_is_refused_with_its_new_name(old, new):
    """In a file, and as a flag, by its full name or its last part."""
    table = TABLES[old]
    option = {table: {old: 1}} if table else {old: 1}
    values = {"stages": [STAGE]} | option if table == "data" else {"stages": [STAGE | option]}
    prefix = f"{table}." if table else ""
    said = f"^{prefix}{old} is now {prefix}{new}; write the new name$"
    with pytest.raises(UsageError, match=said):
        build_recipe(values)
    if table != "data":
        prefix = f"stages.0.{prefix}"
    said = f"^--{prefix}{old} is now --{prefix}{new}; write the new name$"
    with pytest.raises(UsageError, match=said.replace("_", "[-_]")):
        apply_flags({"stages": [STAGE]}, [f"--{prefix}{old}", "1"])
    said = f"^--{old} is now --{new.replace('_', '-')}; write the new name$"
    with pytest.raises(UsageError, match=said):
        apply_flags({"stages": [STAGE]}, [f"--{old}", "1"])


def test_a_recipe_of_a_newer_version_is_refused_before_its_unknown_keys():
    with pytest.raises(UsageError, match=f"has version 99, .* {re.escape(update_command())}"):
        build_recipe({"version": 99, "inventions": {"of": "tomorrow"}})


def test_an_evaluation_after_epochs_can_be_switched_off_and_stays_off():
    recipe = build_recipe(changed(evaluation={"every_epochs": 0, "every_steps": 5}))
    assert from_toml(recipe.to_toml()).evaluation.every_epochs == 0


def test_a_recipe_file_may_have_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "我的"\n[[stages]]\nepochs = 1\n', encoding="utf-8-sig")
    assert build_recipe(read_recipe(str(path))).name == "我的"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("two-stages", None, "unknown recipe 'two-stages'; did you mean two-stage"),
        ("nowhere.toml", None, "nowhere.toml cannot be read"),
        ("broken.toml", b"name = ", "broken.toml is not TOML"),
        ("latin.toml", b'name = "\xe9"', "latin.toml cannot be read"),
    ],
)
def test_an_invalid_recipe_is_named(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_recipe(name)


HOSTILE = {
    "a seed below zero": (b"seed = -1", "seed is -1; give 0 to 9223372036854775807"),
    "a seed that is infinite": (b"seed = 1e999", "seed is inf; expected a whole number"),
    "a seed of thousands of digits": (b"seed = " + b"9" * 1990 * 3, "more than 2,000 characters"),
    "a seed as text": (b'seed = "1"', "seed is '1'; expected a whole number"),
    "a seed that is true": (b"seed = true", "seed is True; expected a whole number"),
    "no version": (b"version = 0", "version is 0; give 1 to 1"),
    "a true version": (b"version = true", "version is True; expected a whole number"),
    "not a number": (
        b"[[stages]]\nepochs=1\noptimizer.learning_rate = nan",
        "optimizer.learning_rate is nan; give 0 to 10",
    ),
    "an enormous batch": (
        b"[[stages]]\nepochs=1\nglobal_batch_size = 1000000000000000000",
        r"global_batch_size is 10{18}; give 2 to",
    ),
    "no batch": (b"[[stages]]\nepochs=1\nglobal_batch_size = 0", "global_batch_size is 0; give 2"),
    "a list for text": (b"[start]\ncheckpoint = ['a']", r"start.checkpoint is \['a'\]; expected"),
    "a number for a table": (b"data = 5", "recipe's data is 5; expected a table"),
    "a table for a list": (b"[data.train]\nx = 1", r"data.train is \{'x': 1\}; expected a list"),
    "stages of numbers": (b"stages = [1]", "is 1; expected a table|not a list of tables"),
    "an empty path": (b"[start]\ncheckpoint = ''", "start.checkpoint is empty; give a value"),
    "an empty source": (b"[data]\ntrain = ['a.csv', '']", r"data.train.1 is empty; give a value"),
    "a NUL": (b'[start]\ncheckpoint = "a\\u0000"', "start.checkpoint is .*; remove the line break"),
    "nobody's home": (b"[output]\nfolder = '~nobody-x/y'", "home of an unknown user"),
    "a long name": (b"[[stages]]\nepochs=1\nname='%s'" % (b"x" * 99), "more than 64 characters"),
    "a key like a known one": (b"[data]\ntrian = ['a']", "'trian'; did you mean train"),
    "deep lists": (b"a = " + b"[" * 1900, "nested too deeply"),
    "deep tables": (b"a" + b".a" * 900 + b" = 1", "nested too deeply"),
    "many lines": (b"# and so on\n" * 10_000, "more than 65,536 bytes; is it a recipe"),
    "a date that is none": (b"seed = 2020-13-45", "is not TOML"),
    "bytes": (bytes(range(256)), "cannot be read: byte 128 is not UTF-8"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_recipe_is_one_sentence_that_names_the_option(tmp_path, content, said):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        build_recipe(apply_flags(read_recipe(str(path)), []))
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("path", ["\0", "~nobody-x/recipe.toml", "x" * 5000, "/dev/zero", "/"])
def test_an_invalid_recipe_path_is_refused(path):
    with pytest.raises(UsageError, match=r"not a valid path|unknown recipe|cannot be read"):
        read_recipe(path)


def test_a_mutated_recipe_is_read_or_refused():
    """Shipped recipes with values of other kinds and sizes: never another error."""
    rng, odd = (
        random.Random(0),
        [-1, 10**18, math.nan, "", "x", "\0", [], [[["a"]]], {"a": 1}, True],
    )
    refused = 0
    for _ in range(200):
        values = tomllib.loads(build_recipe(apply_flags(read_recipe("distill"), [])).to_toml())
        table = rng.choice([values, *values["stages"]])
        while (key := rng.choice([*table])) and type(table[key]) is dict and rng.random() < 0.8:
            table = table[key]
        table[key] = rng.choice(odd)
        try:
            build_recipe(apply_flags(values, ["--epochs", "1"]))
        except UsageError:
            refused += 1
    assert refused > 100


def test_a_difference_names_the_option_and_both_values():
    old = built("two-stage")
    new = built(
        "two-stage", "--workers", "4", "--stages.locked.early_stopping", "off", "--seed", "3"
    )
    assert difference(old, old) == []
    assert difference(old, new) == [
        "data.workers: 2, now 4",
        "seed: 0, now 3",
        "stages.locked.early_stopping.min_gain: 0.001, now None",
        "stages.locked.early_stopping.patience: 3, now None",
    ]


def test_an_option_that_is_off_is_left_out_of_the_toml():
    values = tomllib.loads(built("finetune-muge").to_toml())
    assert "max_grad_norm" not in values["stages"][0]["optimizer"]
    assert "early_stopping" not in values["stages"][0]
