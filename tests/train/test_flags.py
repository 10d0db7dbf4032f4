"""Flags of the command line, ours and the official ones, as changes to a recipe."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from train.test_recipe import SCRIPTS

from cn_clip.cli import run
from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.train.optim import peak_lr
from cn_clip.train.recipe import flags
from cn_clip.train.recipe.flags import OFFICIAL, apply_flags
from cn_clip.train.recipe.schema import options
from cn_clip.train.recipe.toml import build_recipe, read_recipe

TWO = {
    "data": {"train": ["csv:a.csv"], "val": ["csv:b.csv"]},
    "stages": [
        {"name": "locked", "epochs": 5, "early_stopping": {"patience": 7}},
        {"name": "un-locked", "steps": 9, "optimizer": {"reference_batch_size": 64}},
    ],
}


def recipe_of(*flags, values=TWO, world_size=1):
    return build_recipe(apply_flags(values, flags, world_size))


def both(recipe, *path):
    """What the two stages have there."""
    found = []
    for stage in recipe.stages:
        for name in path:
            stage = getattr(stage, name)
        found.append(stage)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.workers", "5"],
        ["--data.workers=5"],
        ["--workers", "5"],
        ["--num-workers", "5"],
        ["--num_workers=5"],
        ["--workers", "3", "--data.workers", "5"],
    ],
)
def test_an_option_is_named_in_full_or_by_its_last_part_or_officially(flags):
    assert recipe_of(*flags).data.workers == 5


def test_hyphens_and_underscores_are_the_same():
    for flag in ("--global-batch-size", "--global_batch_size", "--stages.locked.global-batch-size"):
        assert recipe_of(flag, "64").stages[0].global_batch_size == 64


def test_an_option_of_a_stage_is_for_all_stages_or_the_one_named():
    assert both(recipe_of("--warmup", "3"), "optimizer", "warmup") == [3, 3]
    named = recipe_of("--stages.locked.optimizer.warmup", "3")
    assert both(named, "optimizer", "warmup") == [3, 100]
    assert both(recipe_of("--stages.1.optimizer.warmup", "3"), "optimizer", "warmup") == [100, 3]
    hyphen = recipe_of("--stages.un-locked.optimizer.warmup", "3")
    assert both(hyphen, "optimizer", "warmup") == [100, 3]


def test_the_last_flag_counts():
    recipe = recipe_of("--epochs", "3", "--stages.locked.epochs", "4")
    assert both(recipe, "epochs") == [4, 3]


def test_steps_and_epochs_replace_each_other():
    assert both(recipe_of("--steps", "10"), "epochs") == [None, None]
    recipe = recipe_of("--epochs", "2")
    assert both(recipe, "epochs") == [2, 2] and both(recipe, "steps") == [None, None]


def test_lists_take_values_until_the_next_flag_and_flags_again():
    recipe = recipe_of("--freeze", "visual.*", "bert.*", "--train-data", "a.csv", "b.csv")
    assert both(recipe, "freeze") == [("visual.*", "bert.*")] * 2
    assert recipe.data.train == ("a.csv", "b.csv")
    again = recipe_of("--data.train", "a.csv", "--data.train=b.csv")
    assert again.data.train == ("a.csv", "b.csv")
    assert both(recipe_of("--freeze", "none"), "freeze") == [(), ()]
    for given in (
        ["--lr-multipliers", "visual.*=0.1", "bert.*=2"],
        ["--lr-multipliers=visual.*=0.1", "--lr-multipliers=bert.*=2"],
    ):
        assert (
            both(recipe_of(*given), "optimizer", "lr_multipliers")
            == [("visual.*=0.1", "bert.*=2")] * 2
        )


def test_a_switch_has_an_optional_value():
    assert both(recipe_of("--augment", "--flip"), "augment") == [True, True]
    assert both(recipe_of("--augment", "on", "--flip"), "flip") == [True, True]
    assert both(recipe_of("--loss.duplicates", "off"), "loss", "duplicates") == [False, False]


def test_none_unsets_an_option():
    values = apply_flags(TWO, ["--interpolate", "0.5"])
    assert both(build_recipe(values), "interpolate") == [0.5, 0.5]
    assert both(recipe_of("--interpolate", "none", values=values), "interpolate") == [None, None]
    auto = apply_flags(TWO, ["--interpolate", "auto", "--val-data", "csv:x.csv"])
    assert both(build_recipe(auto), "interpolate") == ["auto", "auto"]
    with pytest.raises(UsageError, match=r"interpolate is 'atuo'; give a number or auto"):
        apply_flags(TWO, ["--interpolate", "atuo"])
    assert both(
        recipe_of("--reference-batch-size", "off"), "optimizer", "reference_batch_size"
    ) == [None, None]


def test_a_table_is_switched_on_with_its_defaults_and_off():
    assert both(recipe_of("--early-stopping", "off"), "early_stopping") == [None, None]
    on = recipe_of("--early-stopping")
    assert [each.patience for each in both(on, "early_stopping")] == [7, 3]
    assert recipe_of("--stages.un-locked.lora", "on").stages[1].lora.rank == 8
    assert recipe_of("--stages.locked.lora.rank", "2").stages[0].lora.rank == 2
    assert [each.rank for each in both(recipe_of("--lora.rank", "2"), "lora")] == [2, 2]


def test_the_recipes_values_stay_as_they_were():
    before = copy.deepcopy(TWO)
    apply_flags(TWO, ["--epochs", "1", "--early-stopping.patience", "1", "--freeze", "bert.*"])
    assert before == TWO


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning-rat", "1"], "unknown flag --learning-rat; did you mean --learning-rate"),
        (["--evalation.every-steps", "1"], "did you mean --evaluation.every-steps"),
        (["--xyzzy", "1"], "unknown flag --xyzzy; See: cn-clip train --help"),
        (["--stages", "5"], "unknown flag --stages"),
        (["--stages.lockd.epochs", "1"], "unknown stage 'lockd'; did you mean locked"),
        (["--stages.7.epochs", "1"], "unknown stage '7'"),
        (
            ["--stages.locked", "5"],
            r"names a stage; give one of its options, such as --stages\.locked\.epochs",
        ),
        (["--stages.locked.epoch", "1"], "'epoch'; did you mean epochs"),
        (["--stages.locked.epochs.all", "1"], "epochs has no options"),
        (["workers", "5"], "'workers' is not a flag; write --NAME VALUE"),
        (["--", "5"], "'--' is not a flag"),
        (["--workers", "many"], "--workers is 'many'; give a whole number"),
        (["--learning-rate", "fast"], "is 'fast'; give a number"),
        (["--augment", "perhaps"], "is 'perhaps'; give true or false"),
        (
            ["--early-stopping", "3"],
            r"--early-stopping is on or off; its options are such as --early-stopping\.patience",
        ),
        (["--precision", "fp8"], "unknown --precision 'fp8'"),
        (["--learning-rate"], "--learning-rate needs a value"),
        (["--start.text", "--augment"], "--start.text needs a value"),
        (["--stages.locked.freeze"], "--stages.locked.freeze needs a value"),
        (["--train-data"], "--train-data needs a value"),
        (["--batch-size", "8x"], "--batch-size is '8x'; give a whole number"),
        (["--accum-freq", "2"], "multiplies --batch-size; give both, or --global-batch-size"),
        (["--vision-model", "RN50"], "give both --vision-model and --text-model"),
    ],
)
def test_an_invalid_flag_is_refused_with_the_remedy(flags, said):
    with pytest.raises(UsageError, match=said):
        recipe_of(*flags)


def test_an_ambiguous_name_lists_the_options(monkeypatch):
    rates = [("a.rate", float, 0.0, ""), ("b.rate", float, 0.0, "")]
    monkeypatch.setattr(flags, "options", lambda: rates)
    with pytest.raises(
        UsageError, match=r"--rate could be --a\.rate or --b\.rate; write the whole"
    ):
        apply_flags({}, ["--rate", "1"])


def test_only_names_repeat_as_the_last_part_of_an_option():
    """So that the last part is always enough, and the recipe's name is the one that is meant."""
    counts = Counter(name.split(".")[-1] for name, _, _, _ in options())
    assert [name for name, count in counts.items() if count > 1] == ["name"]
    assert recipe_of("--name", "mine").name == "mine"


VALUES = {  # of official flags that take no text of any kind
    "precision": "amp", "batch-size": "16", "accum-freq": "4", "lr": "1e-4", "wd": "0.2",
    "vision-model": "RN50", "text-model": "RBT3-chinese", "kd-loss-weight": "0.3",
    "train-data": "a.csv", "val-data": "b.csv", "logs": "runs", "clip-weight-path": "c.pt",
    "bert-weight-path": "d.pt", "teacher-model-name": "ViT-H-14",
}  # fmt: skip
TOGETHER = {
    "accum-freq": "batch-size", "vision-model": "text-model", "text-model": "vision-model",
    "distllation": "teacher-model-name", "distillation": "teacher-model-name",
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("underscores", [False, True])
def test_every_official_flag_is_understood(name, underscores):
    given = []
    for each in [TOGETHER[name], name] if name in TOGETHER else [name]:
        given.append("--" + (each.replace("-", "_") if underscores else each))
        given += [VALUES.get(each, "12")] if OFFICIAL[each].takes_value else []
    recipe = recipe_of(*given)
    always_so = {"report-training-batch-acc", "use-flash-attention", "gather-with-grad"}
    always_so |= {"valid-batch-size", "precision"}  # amp is the default here, too
    always_so |= {"use-bn-sync", "debug"}
    always_so |= {"skip-aggregate", "reset-data-offset", "reset-optimizer"}
    always_so |= {"save-epoch-frequency", "valid-num-workers", "local-rank"}
    assert (recipe == recipe_of()) == (name in always_so)


@pytest.mark.parametrize(
    ("flags", "path", "expected"),
    [
        ("--max-epochs 4", "stages.0.epochs", 4),
        ("--max-steps 4", "stages.1.steps", 4),
        ("--valid-step-interval 4", "evaluation.every_steps", 4),
        ("--valid-epoch-interval 4", "evaluation.every_epochs", 4),
        ("--context-length 24", "start.context_length", 24),
        ("--lr 3e-5", "stages.0.optimizer.learning_rate", 3e-5),
        ("--lr 3e-5", "stages.1.optimizer.reference_batch_size", None),
        ("--wd 0.2", "stages.0.optimizer.weight_decay", 0.2),
        ("--beta1 0.8", "stages.0.optimizer.beta1", 0.8),
        ("--eps 1e-8", "stages.0.optimizer.eps", 1e-8),
        ("--mask-ratio 0.5", "stages.0.mask_ratio", 0.5),
        ("--save-step-frequency 50", "output.save_every", 50),
        ("--log-interval 3", "output.log_every", 3),
        ("--logs here", "output.folder", "here"),
        ("--precision amp", "machine.precision", "bf16"),
        ("--precision fp32", "machine.precision", "fp32"),
        ("--grad-checkpointing", "machine.grad_checkpointing", True),
        ("--freeze-vision", "stages.0.freeze", ("visual.*",)),
        ("--use-augment", "stages.0.augment", True),
        ("--use-augment", "stages.0.flip", True),
        ("--skip-scheduler", "stages.0.optimizer.schedule", "constant"),
        ("--clip-weight-path c.pt", "start.image", "c.pt"),
        ("--bert-weight-path b.pt", "start.text", "b.pt"),
        ("--text b.pt", "start.text", "b.pt"),
        ("--vision-model RN50 --text-model RBT3-chinese", "start.model", "RN50@RBT3-chinese"),
        ("--kd_loss_weight 0.7", "stages.0.loss.teacher_weight", 0.7),
        ("--distllation --teacher-model-name RN50", "stages.0.loss.teacher", "RN50"),
        ("--distillation --teacher-model-name=ViT-H-14", "stages.1.loss.teacher", "ViT-H-14"),
        ("--gather-with-grad --seed 5", "seed", 5),
        ("--save-step-frequency -1", "output.save_every", None),
        ("--logs experiments --name first", "output.folder", "experiments/first"),
        ("--name=second --logs=experiments/", "output.folder", "experiments/second"),
        ("--logs=experiments --name=first", "name", "first"),
        ("--logs experiments --name first --folder mine", "output.folder", "mine"),
    ],
)
def test_an_official_flag_sets_its_options(flags, path, expected):
    found = recipe_of(*flags.split())
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == expected


# The official parser's own: its names, and the type, choices or "switch" of each.
PARSER = json.loads((Path(__file__).parent / "official_flags.json").read_text(encoding="utf-8"))
NEEDED = {"--accum-freq": ["--batch-size", "2"], "--distillation": ["--teacher", "RN50"]}
NEEDED |= {"--vision-model": ["--text-model", "RBT3-chinese"]}
NEEDED |= {"--text-model": ["--vision-model", "RN50"]}
KINDS = {"int": "2", "float": "0.25", "str": "some"}


@pytest.mark.parametrize("name", PARSER)
def test_every_flag_of_the_official_parser_is_accepted_with_every_value_it_may_have(name, capsys):
    kind = PARSER[name]
    values = (
        [[]] if kind == "switch" else [[v] for v in (kind if type(kind) is list else [KINDS[kind]])]
    )
    for value in values:
        for spelled in ([name, *value], ["=".join([name, *value])]):
            recipe = ["train", "--recipe", "finetune-muge", "--val-data", "b.csv"]
            code = run([*recipe, "--show", "recipe", *NEEDED.get(name, []), *spelled])
            assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--distilation", "--distillation"),
        ("--teacher-model-nam", "--teacher-model-name"),
        ("--use-bn-sink", "--use-bn-sync"),
        ("--kd-los-weight", "--kd-loss-weight"),
        ("--max-epoch", "--max-epochs"),
    ],
)
def test_a_typing_error_in_an_official_flag_is_named(typed, meant):
    with pytest.raises(UsageError, match=f"unknown flag {typed}; did you mean {meant}"):
        recipe_of(typed, "1")


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(UsageError, match="needs a teacher; give --teacher-model-name"):
        recipe_of("--distillation")
    taught = {"stages": [{"epochs": 1, "loss": {"teacher": "RN50"}}]}
    assert recipe_of("--distillation", values=taught).stages[0].loss.teacher == "RN50"


def test_official_logs_without_a_folder_are_refused():
    with pytest.raises(UsageError, match="--logs is None, but a run needs a folder"):
        recipe_of("--logs", "None")


def test_synchronised_batch_norm_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="--use-bn-sync is ignored"):
        recipe_of("--use-bn-sync", world_size=2)


def test_the_official_batch_is_one_processs_and_accumulated():
    def size(*flags, world_size):
        return recipe_of(*flags, world_size=world_size).stages[1].global_batch_size

    assert size("--batch-size", "128", world_size=8) == 1024
    assert size("--accum-freq", "2", "--batch-size", "128", world_size=8) == 2048
    assert size("--global-batch-size", "128", world_size=8) == 128


@pytest.mark.parametrize("name", ["batch", "accumulate", "vision", "text-tower"])
def test_parts_of_an_official_option_are_no_flags_of_their_own(name):
    with pytest.raises(UsageError, match=f"unknown flag --{name}"):
        recipe_of(f"--{name}", "8", world_size=8)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_of_an_official_script_equal_the_shipped_recipe(name):
    script = SCRIPTS[name]
    flags = (
        f"--batch-size={script['batch']} --accum-freq=1 --lr={script['lr']} --wd=0.001 "
        f"--warmup={script['warmup']} --max-epochs={script['epochs']} --use-augment "
        "--valid-epoch-interval=1 --report-training-batch-acc"
    ).split()
    theirs = recipe_of(*flags, values={}, world_size=8).stages[0]
    ours = build_recipe(read_recipe(name)).stages[0]
    assert theirs.global_batch_size == ours.global_batch_size
    assert peak_lr(theirs.optimizer, 1024) == script["lr"]
    same = ("warmup", "weight_decay", "schedule", "beta1", "beta2", "eps")
    assert all(getattr(theirs.optimizer, n) == getattr(ours.optimizer, n) for n in same)
    assert all(getattr(theirs, n) == getattr(ours, n) for n in ("epochs", "augment", "flip"))


def test_stages_that_are_no_list_are_refused():
    with pytest.raises(UsageError, match=r"write \[\[stages\]\]"):
        recipe_of("--epochs", "1", values={"stages": {"epochs": 1}})
    with pytest.raises(UnknownNameError):
        recipe_of("--stages.first.epochs", "1", values={})
