"""The schema of a recipe: every option of a training run, as a tree of frozen dataclasses.

Each option carries its help text; ``docs/recipe.md`` is generated from them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from cn_clip.translation import N_, _, translate

VERSION = 1  # incremented by changes that an older cn_clip would misread

Precision = Literal["bf16", "fp16", "fp32"]


def _option(default: Any, help: str, within: tuple[float, float] | None = None) -> Any:
    """Return an option; ``within`` is the range of a number."""
    return field(default=default, metadata={"help": help, "within": within})


def _table(cls: type, help: str) -> Any:
    return field(default_factory=cls, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation data."""

    train: tuple[str, ...] = _option((), "Sources of training pairs, such as `tar:shards/*.tar`")
    val: tuple[str, ...] = _option((), "Sources of validation pairs, which scores are measured on")
    keep_data: tuple[str, ...] = _option(
        (),
        "Sources of validation pairs of another kind, whose score `interpolate = "
        '"auto"` limits the loss of',
    )
    workers: int = _option(
        2, "Processes that read and decode, for each training process", (0, 1024)
    )
    prefetch_mb: int = _option(
        1024, "Limit of prepared pairs in memory, in megabytes", (1, 1 << 30)
    )
    fast_decode: bool = _option(False, "Decode large JPEG files at reduced size")
    max_skipped_fraction: float = _option(
        0.1, "Fraction of unreadable pairs above which the run ends", (0, 1)
    )


@dataclass(frozen=True, slots=True)
class Start:
    """The initial weights. Tensors that no file provides are random, and the log names them."""

    model: str | None = _option(
        None,
        "A name of `cn-clip models`, VISION@TEXT, or a folder with a config.json; by default the "
        "model of the checkpoint",
    )
    checkpoint: str | None = _option(None, "All weights: a path, a name, or org/name on a hub")
    image: str | None = _option(None, "Image tower: a CLIP file (OpenAI, Hugging Face, ...)")
    text: str | None = _option(None, "Text tower: a file of a Chinese BERT or RoBERTa")
    resolution: int | None = _option(
        None, "Side of the images in pixels; position embeddings are resized", (1, 4096)
    )
    context_length: int | None = _option(
        None, "Maximum tokens of a text; by default the model's, 52", (2, 512)
    )


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW and its learning rate."""

    learning_rate: float = _option(5e-5, "Peak learning rate", (0, 10))
    reference_batch_size: int | None = _option(
        None,
        "Global batch size that learning_rate is given for; it is scaled to the actual batch size",
        (1, 1 << 30),
    )
    scaling: Literal["linear", "sqrt", "none"] = _option(
        "linear", "How the learning rate scales from reference_batch_size to the actual batch size"
    )
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = _option(
        "cosine", "Learning rate schedule after the warm-up"
    )
    warmup: int = _option(
        100, "Warm-up steps; 10 % of the stage if the stage is not longer than this", (0, 1 << 40)
    )
    weight_decay: float = _option(
        0.001,
        "Weight decay, except of biases, the logit scale and norms; BERT's norms are decayed, as "
        "in the official training",
        (0, 10),
    )
    beta1: float = _option(0.9, "beta1 of AdamW", (0, 0.99999))
    beta2: float = _option(0.98, "beta2 of AdamW", (0, 0.9999999))
    eps: float = _option(1e-6, "eps of AdamW", (0, 1))
    max_grad_norm: float | None = _option(
        None, "Maximum norm of the gradient; larger gradients are clipped to it", (1e-6, 1e6)
    )
    layer_decay: float = _option(
        1.0, "Factor on the learning rate from each layer to the one below, such as 0.75", (0.01, 1)
    )
    lr_multipliers: tuple[str, ...] = _option(
        (),
        "Factors on the learning rate by patterns of parameter names, such as "
        "`visual.backbone.*=0.1`; the last matching pattern counts",
    )
    ema: float = _option(
        0.0,
        "Decay of an exponential moving average of the weights, such as 0.999; the average is "
        "what is evaluated and saved",
        (0, 0.9999999),
    )


@dataclass(frozen=True, slots=True)
class Loss:
    """The training loss."""

    kind: Literal["clip", "sigmoid"] = _option(
        "clip", "CLIP's symmetric cross-entropy, or SigLIP's sigmoid loss"
    )
    duplicates: bool = _option(
        True,
        "Pairs of a batch with the same image, text id or caption count as positives; false gives "
        "the plain loss",
    )
    teacher: str | None = _option(None, "Model to distill from: a name or a path")
    teacher_weight: float = _option(
        0.5, "Weight of the teacher's similarities in the targets of the clip loss", (0, 1)
    )
    teacher_features: float = _option(
        0.0,
        "Weight of the distance to the teacher's embeddings, after a learned projection",
        (0, 1e6),
    )
    text_targets: str | None = _option(
        None,
        "Texts with target embeddings from a sentence encoder: a folder in clip-retrieval's "
        "layout, of the model's embedding width",
    )
    text_targets_weight: float = _option(
        1.0, "Weight of the mean cosine distance to the targets", (0, 1e6)
    )
    text_targets_batch_size: int = _option(
        512, "Texts with targets in a step, over all processes", (1, 1 << 30)
    )


@dataclass(frozen=True, slots=True)
class EarlyStoppingOptions:
    """When a stage ends early: the mean recall on the validation pairs has stopped improving."""

    patience: int = _option(
        3, "Evaluations without improvement after which the stage ends", (1, 1 << 30)
    )
    min_gain: float = _option(
        0.001, "Minimum improvement of the mean recall that counts; 0.001 is 0.1 %", (0, 1)
    )


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates of chosen matrices (Hu et al., arXiv:2106.09685). All other parameters but
    the logit scale are frozen; the updates are merged into the weights at the end of the stage."""

    layers: tuple[str, ...] = _option(
        ("*.attn.in_proj_weight", "bert.*.self.*.weight"), "Patterns of the matrices' names"
    )
    rank: int = _option(8, "Rank of the update", (1, 1 << 16))
    alpha: float = _option(16.0, "The update is scaled by alpha / rank", (0, 1e6))


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its frozen parameters, length, optimizer and loss."""

    name: str = _option("train", "Name, shown in the log and in folder names")
    freeze: tuple[str, ...] = _option((), "Patterns of parameters to freeze, such as `visual.*`")
    epochs: int | None = _option(
        None, "Length in epochs; the schedule spans all of them", (1, 1 << 30)
    )
    steps: int | None = _option(None, "Length in steps, instead of epochs", (1, 1 << 40))
    early_stopping: EarlyStoppingOptions | None = field(
        default=None, metadata={"help": "Ends the stage when the score has stopped improving"}
    )
    # The contrastive loss of a single pair is zero.
    global_batch_size: int = _option(128, "Pairs in a step, over all processes", (2, 1 << 30))
    micro_batch_size: int | None = _option(
        None,
        "Pairs that a process has in memory at once; larger batches use gradient caching, which "
        "gives the gradients of the whole batch",
        (1, 1 << 30),
    )
    augment: bool = _option(False, "Crop and recolour images, as the official training does")
    flip: bool = _option(False, "Mirror half of the augmented images")
    batch_norm: Literal["auto", "frozen", "train"] = _option(
        "auto",
        "Running statistics of BatchNorm: `frozen` keeps them, `train` updates them from the "
        "batches; `auto` is `frozen` if training starts from `start.checkpoint` alone",
    )
    mask_ratio: float = _option(
        0.0, "Fraction of patches dropped at random (FLIP; ViT only)", (0, 0.99)
    )
    dropout: float | None = _option(
        None, "Dropout of the text tower; by default that of the model's config", (0, 0.99)
    )
    cached: bool = _option(
        False, "Compute the features of the frozen image tower once, and keep them on disk"
    )
    views: int = _option(1, "Augmented versions of each image in the feature cache", (1, 1000))
    features_stored_as: Literal["fp32", "fp16"] = _option(
        "fp32", "Precision of the feature cache on disk; fp16 takes half the space"
    )
    center_texts: bool = _option(
        False,
        "Before the first step, project the mean image embedding of the training pairs out of "
        "`text_projection`, so that no text is close to every image; needs cached features",
    )
    interpolate: float | Literal["auto"] | None = _option(
        None,
        "Interpolate the best weights of the stage with its initial weights: 1 is all new, 0 all "
        "old, `auto` chooses one of 0, 0.1 ... 1 by the loss on the validation pairs (WiSE-FT, "
        "arXiv:2109.01903)",
        (0, 1),
    )
    optimizer: Optimizer = _table(Optimizer, "AdamW and its learning rate")
    loss: Loss = _table(Loss, "The training loss")
    lora: Lora | None = field(default=None, metadata={"help": "Low-rank updates"})


@dataclass(frozen=True, slots=True)
class Machine:
    """Device, precision and parallelism."""

    device: str = _option("auto", "cpu, cuda, mps or auto")
    precision: Precision = _option(
        "bf16", "Precision of the towers; weights and losses are in float32"
    )
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "With several processes: replicas (DDP), or sharded weights (FSDP2)"
    )
    grad_checkpointing: bool = _option(
        False, "Recompute activations in the backward pass to save memory"
    )
    compile: bool = _option(False, "torch.compile each tower")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """When the score is measured: recall in both directions on the validation pairs."""

    every_epochs: int = _option(
        1, "Epochs between evaluations; 0 evaluates only at the end of a stage", (0, 1 << 30)
    )
    every_steps: int | None = _option(None, "Steps between additional evaluations", (1, 1 << 30))
    score_precision: Precision | None = _option(
        None,
        "Precision of the towers in an evaluation; by default that of training. fp32 "
        "distinguishes small gains",
    )


@dataclass(frozen=True, slots=True)
class Output:
    """The run's folder, its states and its log."""

    folder: str = _option("run", "Folder of the run")
    save_every: int | None = _option(
        None,
        "Steps between saved states; a state is also saved at the end of every epoch",
        (1, 1 << 30),
    )
    keep: int = _option(2, "Number of states kept", (1, 1000))
    background_saves: bool = _option(
        False, "Write states while training goes on; needs memory for a copy of a state"
    )
    features: str | None = _option(
        None, "Folder of cached features; by default in the folder of the run"
    )
    log_every: int = _option(10, "Steps between lines of the log", (1, 1 << 30))
    tensorboard: bool = _option(False, "Also log for TensorBoard")
    swanlab: bool = _option(False, "Also log to SwanLab")
    wandb: bool = _option(False, "Also log to Weights & Biases")
    stop_at_chance: int = _option(
        300, "Steps after which a loss that stays at ln(batch) ends the run; 0: never", (0, 1 << 30)
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """All options of a training run."""

    version: int = _option(VERSION, "Version of the recipe format", (1, VERSION))
    name: str = _option("train", "Name of the recipe")
    seed: int = _option(
        0, "Seed of order, augmentation, dropout and random weights", (0, (1 << 63) - 1)
    )
    data: Data = _table(Data, "Training and validation data")
    start: Start = _table(Start, "The initial weights")
    machine: Machine = _table(Machine, "Device, precision and parallelism")
    evaluation: Evaluation = _table(Evaluation, "When the score is measured")
    output: Output = _table(Output, "The run's folder, its states and its log")
    stages: tuple[Stage, ...] = field(
        default=(Stage(),), metadata={"help": "The stages, in order, each with the options below"}
    )

    def to_toml(self) -> str:
        """Return the whole recipe as TOML, which ``toml.read_recipe`` reads back."""
        return tomli_w.dumps(_without_none(asdict(self)))


def options(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted name, type, default, help) of every option, in order.

    The names of stage options begin with ``stages.NAME``.
    """
    hints = get_type_hints(cls)
    for option in fields(cls):
        name = f"{prefix}{option.name}"
        kind = hints[option.name]
        inner = nested_class(kind)
        if inner is not None:
            stage = "NAME." if get_origin(kind) is tuple else ""
            yield from options(inner, f"{name}.{stage}")
        else:
            default = option.default if option.default is not MISSING else None
            yield name, kind, default, option.metadata["help"]


def nested_class(kind: Any) -> type | None:
    """Return the dataclass in a type: ``C``, ``C | None`` or ``tuple[C, ...]``; None otherwise."""
    for candidate in (kind, *get_args(kind)):
        if is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def type_text(kind: Any) -> str:
    """Return a type in words, for messages and documentation."""
    if get_origin(kind) in (Union, types.UnionType):
        return _(" or ").join(type_text(arg) for arg in get_args(kind) if arg is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return _("list of {kind}s", kind=type_text(get_args(kind)[0]))
    names = {
        bool: N_("true or false"),
        int: N_("whole number"),
        float: N_("number"),
        str: N_("text"),
    }
    return translate(names.get(kind, N_("table")))


def _without_none(value: Any) -> Any:
    """Drop options that are None, since TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
