"""A recipe: everything that decides a training run, as one frozen tree of values.

The help of every option stands beside it; ``docs/recipe.md`` is made of it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

VERSION = 1  # counts changes after which an older cn_clip would misread a recipe

Precision = Literal["bf16", "fp16", "fp32"]


def _option(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


def _group(cls: type, told: str) -> Any:
    return field(default_factory=cls, metadata={"help": told})


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on."""

    train: tuple[str, ...] = _option((), "Sources of pairs, such as `tar:shards/*.tar`, or several")
    val: tuple[str, ...] = _option((), "Sources of the pairs that scores are measured on")
    keep_data: tuple[str, ...] = _option(
        (),
        "Sources of pairs of another kind whose score should be kept, which `interpolate = "
        '"auto"` measures and heeds',
    )
    workers: int = _option(2, "Processes that read and decode, beside each training process")
    prefetch_mb: int = _option(1024, "How many megabytes of prepared pairs may wait")
    fast_decode: bool = _option(False, "Decode large JPEG files at reduced size")
    most_skipped: float = _option(0.1, "Share of unreadable pairs above which the run ends")


@dataclass(frozen=True, slots=True)
class Start:
    """Where the weights come from. What no file gives stays random, and the log says so."""

    model: str | None = _option(
        None,
        "A name of `cn-clip models`, VISION@TEXT, or a folder with a config.json; by default what "
        "the checkpoint holds",
    )
    checkpoint: str | None = _option(None, "All weights: a path, a name, or org/name on a hub")
    image: str | None = _option(None, "Image tower: a file of CLIP (OpenAI, Hugging Face, ...)")
    text: str | None = _option(None, "Text tower: a file of a Chinese BERT or RoBERTa")
    resolution: int | None = _option(
        None, "Side of the pictures in pixels; position embeddings are resized"
    )
    context_length: int | None = _option(None, "Most tokens of a text; by default the model's, 52")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW and its learning rate."""

    learning_rate: float = _option(5e-5, "Peak learning rate")
    for_batch: int | None = _option(
        None, "Global batch that the rate is meant for; it is scaled to the actual one"
    )
    scaling: Literal["linear", "sqrt", "none"] = _option(
        "linear", "How the rate grows with the global batch, if for_batch is given"
    )
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = _option(
        "cosine", "How the rate falls after the warm-up"
    )
    warmup: int = _option(
        100, "Steps in which the rate rises from zero; cut to a tenth of a stage that is no longer"
    )
    weight_decay: float = _option(
        0.001, "Of all but biases, the logit scale and norms; of BERT's norms too, as officially"
    )
    beta1: float = _option(0.9, "Of AdamW")
    beta2: float = _option(0.98, "Of AdamW")
    eps: float = _option(1e-6, "Of AdamW")
    clip_norm: float | None = _option(None, "Longest gradient; a longer one is shortened to it")
    layer_decay: float = _option(
        1.0, "Factor on the rate from each layer to the one below; 0.75 keeps low layers still"
    )
    rates: tuple[str, ...] = _option(
        (),
        "Factors on the rate by patterns of names, such as `visual.backbone.*=0.1`; of several "
        "that match a parameter, the last counts",
    )
    ema: float = _option(
        0.0, "Decay of averaged weights, such as 0.999, which are then what is measured and kept"
    )


@dataclass(frozen=True, slots=True)
class Loss:
    """What is minimised."""

    kind: Literal["clip", "sigmoid"] = _option(
        "clip", "CLIP's symmetric cross-entropy, or SigLIP's sigmoid loss"
    )
    duplicates: bool = _option(
        True,
        "Pairs of a batch that share picture, text id or caption count as matching; false gives "
        "the plain loss",
    )
    teacher: str | None = _option(None, "A local model to learn from: a name or a path")
    teacher_weight: float = _option(
        0.5, "Share of the teacher's similarities in the targets of the clip loss"
    )
    teacher_features: float = _option(
        0.0, "Weight of the distance to the teacher's embeddings, after a learned projection"
    )
    sentences: str | None = _option(
        None,
        "Texts with embeddings to keep to, of a sentence encoder: a folder in clip-retrieval's "
        "layout, as wide as the model's",
    )
    sentences_weight: float = _option(1.0, "Of the mean cosine distance to them")
    sentences_batch_size: int = _option(512, "Texts of them in a step, over all processes")


@dataclass(frozen=True, slots=True)
class Plateau:
    """When a stage ends early: the mean recall on the validation pairs has stopped to rise."""

    patience: int = _option(3, "Evaluations without a gain after which the stage ends")
    min_gain: float = _option(0.001, "Least rise of the mean recall that counts; 0.001 is 0.1 %")


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates of chosen matrices (Hu et al., arXiv:2106.09685). All else but the logit
    scale is frozen; the updates are merged into the weights at the end of the stage."""

    layers: tuple[str, ...] = _option(
        ("*.attn.in_proj_weight", "bert.*.self.*.weight"), "Patterns of the matrices' names"
    )
    rank: int = _option(8, "Of the update")
    alpha: float = _option(16.0, "The update is scaled by alpha / rank")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what is frozen, how long it lasts, and its own optimizer and loss."""

    name: str = _option("train", "Shown in logs and names of folders")
    freeze: tuple[str, ...] = _option((), "Patterns of parameters to keep, such as `visual.*`")
    epochs: int | None = _option(None, "Passes over the pairs, which the schedule is laid over")
    steps: int | None = _option(None, "Steps, instead of epochs")
    plateau: Plateau | None = field(
        default=None, metadata={"help": "Ends the stage when the score stops to rise"}
    )
    global_batch_size: int = _option(128, "Pairs in a step, over all processes")
    micro_batch_size: int | None = _option(
        None,
        "Pairs that a process has in memory at once; more are done by gradient caching, which "
        "gives the gradients of the whole batch",
    )
    augment: bool = _option(False, "Crop and recolour pictures, as the official training does")
    flip: bool = _option(False, "Mirror half of the augmented pictures")
    batch_norm: Literal["auto", "frozen", "train"] = _option(
        "auto",
        "Running statistics of BatchNorm: `frozen` keeps them, `train` updates them by the "
        "batches; `auto` is `frozen` if training starts from `start.checkpoint` alone",
    )
    mask_ratio: float = _option(0.0, "Share of patches left out at random (FLIP; ViT only)")
    dropout: float | None = _option(None, "Of the text tower; by default the model's own")
    cached: bool = _option(
        False, "Compute the features of the frozen image tower once, and keep them on disk"
    )
    views: int = _option(1, "Augmented versions of each picture to compute, if cached")
    interpolate: float | Literal["auto"] | None = _option(
        None,
        "Mix the best weights of the stage with those it began with: 1 is all new, 0 all old, "
        "`auto` what the validation pairs choose of 0, 0.1 ... 1 (WiSE-FT, arXiv:2109.01903)",
    )
    optimizer: Optimizer = _group(Optimizer, "AdamW and its rate")
    loss: Loss = _group(Loss, "What is minimised")
    lora: Lora | None = field(default=None, metadata={"help": "Low-rank updates"})


@dataclass(frozen=True, slots=True)
class Machine:
    """What it runs on, and in which numbers."""

    device: str = _option("auto", "cpu, cuda, mps or auto")
    precision: Precision = _option("bf16", "Of the towers; weights and losses are in float32")
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "With several processes: whole copies, or weights in shares (FSDP2)"
    )
    grad_checkpointing: bool = _option(False, "Save memory by computing activations twice")
    compile: bool = _option(False, "torch.compile each tower")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """When the score is measured: recall in both directions on the validation pairs."""

    every_epochs: int = _option(1, "After so many epochs; 0: not, only at the end of a stage")
    every_steps: int | None = _option(None, "And after so many steps")
    score_precision: Precision | None = _option(
        None, "Of the towers meanwhile, by default that of training; fp32 tells small gains apart"
    )


@dataclass(frozen=True, slots=True)
class Output:
    """What is written where."""

    folder: str = _option("run", "The run's folder; it holds everything")
    save_every: int | None = _option(None, "Save the state after so many steps; always at epochs")
    keep: int = _option(2, "States kept")
    features: str | None = _option(None, "Folder of cached features; by default in the run's")
    log_every: int = _option(10, "Steps between lines of the log")
    tensorboard: bool = _option(False, "Also log for TensorBoard")
    swanlab: bool = _option(False, "Also log to SwanLab")
    wandb: bool = _option(False, "Also log to Weights & Biases")
    stop_at_chance: int = _option(
        300, "Steps after which a loss that stands at ln(batch) ends the run; 0: never"
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run."""

    version: int = _option(VERSION, "Of the recipe format")
    name: str = _option("train", "Of the recipe")
    seed: int = _option(0, "Of the order, the augmentation, the dropout and random weights")
    data: Data = _group(Data, "What is trained on")
    start: Start = _group(Start, "Where the weights come from")
    machine: Machine = _group(Machine, "What it runs on")
    evaluation: Evaluation = _group(Evaluation, "When the score is measured")
    output: Output = _group(Output, "What is written where")
    stages: tuple[Stage, ...] = field(
        default=(Stage(),), metadata={"help": "One after another, each with what follows"}
    )

    def to_toml(self) -> str:
        """Return the whole recipe as TOML; ``reading.from_toml`` reads it back."""
        return tomli_w.dumps(_without_none(asdict(self)))


def options(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted name, type, default, help) of every option, in order.

    Options of a stage are named as those of ``stages.NAME``.
    """
    hints = get_type_hints(cls)
    for each in fields(cls):
        name = f"{prefix}{each.name}"
        kind = hints[each.name]
        inner = nested(kind)
        if inner is not None:
            more = "NAME." if get_origin(kind) is tuple else ""
            yield from options(inner, f"{name}.{more}")
        else:
            default = each.default if each.default is not MISSING else None
            yield name, kind, default, each.metadata["help"]


def nested(kind: Any) -> type | None:
    """Return the dataclass that a type is, may be, or is a tuple of."""
    for each in (kind, *get_args(kind)):
        if is_dataclass(each) and isinstance(each, type):
            return each
    return None


def spoken(kind: Any) -> str:
    """Name a type as people say it."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(spoken(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of {spoken(get_args(kind)[0])}s"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(kind) or "table"


def _without_none(value: Any) -> Any:
    """TOML has no null: an option that is off is left out."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list | tuple) else value
