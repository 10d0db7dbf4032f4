"""Interpolation of a stage's best weights with its initial weights (WiSE-FT, Wortsman et al.,
arXiv:2109.01903): by a given weight, or by one chosen on the validation pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cn_clip import distributed, weights
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.metrics.recall import Retrieval
from cn_clip.model.clip import CLIP
from cn_clip.train.run.checkpoint import Progress
from cn_clip.train.run.events import MixtureScore, MixturesEvent, WarningEvent, interpolated
from cn_clip.train.run.signals import InterruptedRun
from cn_clip.train.scoring import log_score
from cn_clip.train.stage import Run
from cn_clip.train.validation import Vectors, contrastive_loss, embed, score
from cn_clip.translation import _

WEIGHTS = tuple(n / 10 for n in range(11))  # tried by "auto"; 0 is all old, 1 all new
MOST_LOST = 0.01  # mean recall that the kept pairs may lose

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen mixture, and whether the kept pairs lose at most ``MOST_LOST`` by it."""

    mixture: MixtureScore
    within: bool = True


def choose(mixtures: Sequence[MixtureScore]) -> Choice:
    """Choose a mixture; the first has weight 0, the initial weights.

    It is the one with the lowest validation loss, among those with no lower validation recall than
    the initial weights; recall on a few dozen pairs is too noisy to choose by. Ties go to the lower
    weight. With kept pairs, only mixtures that lose at most ``MOST_LOST`` of their mean recall are
    candidates; if none of these improves the loss, all are, and ``within`` is False.
    """
    start = mixtures[0]
    mixtures = [each for each in mixtures if each.score >= start.score]

    def best(among: Sequence[MixtureScore]) -> MixtureScore:
        return min(among, key=lambda each: (each.loss, each.weight))

    if start.kept is None:
        return Choice(best(mixtures))
    limit = start.kept - MOST_LOST - 1e-9  # a loss of just so much is allowed
    found = best([each for each in mixtures if each.kept is not None and each.kept >= limit])
    if found.loss < start.loss:
        return Choice(found)
    found = best(mixtures)
    return Choice(found, within=found is start)


def mix_stage(run: Run, progress: Progress, begun: str) -> float | None:
    """Interpolate the best weights of a stage, ``progress.weights``, with its initial weights.

    The result is written to a new folder, which ``progress.weights`` then names, so that a run
    stopped here interpolates only once.

    Returns:
        Its mean recall, None without validation pairs.

    Raises:
        InterruptedRun: a signal arrived; the mixtures are measured again after resume.
    """
    stage = run.recipe.stages[progress.stage]
    assert stage.interpolate is not None
    model = weights.build(weights.read(run.folder / progress.weights))
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = weights.build(weights.read(run.folder / begun)).state_dict()
    if stage.interpolate == "auto":
        weight = _swept(run, progress, model, old, new)
    else:
        weight = stage.interpolate
    mix(model.cpu(), old, new, weight)
    progress.weights = f"{progress.weights}-mixed"
    if distributed.is_main():
        weights.save_weights(model.config, model.state_dict(), run.folder / progress.weights)
    distributed.barrier()
    if run.validation is None:
        return None
    model.to(run.device)
    recall, _, _ = _measured(run, model, run.validation, None)
    log_score(run, interpolated(stage.name), progress, recall)
    return recall.mean_recall


@torch.no_grad()
def mix(model: CLIP, old: State, new: State, weight: float) -> None:
    """Set a model to the weights between ``old`` and ``new``, BatchNorm statistics included."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(new[name], old[name].to(new[name]), 1 - weight))


def _swept(run: Run, progress: Progress, model: CLIP, old: State, new: State) -> float:
    """Measure the mixtures of all ``WEIGHTS``, log them, and return the chosen weight."""
    assert run.validation is not None
    stage = run.recipe.stages[progress.stage].name
    image_tower_unchanged = all(
        torch.equal(old[n], t) for n, t in new.items() if n.startswith("visual.")
    )
    images: list[Vectors | None] = [None, None]  # of the validation and kept pairs
    mixtures = []
    model.to(run.device)
    for number, weight in enumerate(WEIGHTS):
        run.log.tick(_("measuring mixtures"), number, len(WEIGHTS))
        stop = run.stop.on_any_process(run.device)
        if stop:
            raise InterruptedRun(
                _(
                    "stopped while mixtures of weights were measured, which is done again when "
                    "the run resumes. Resume with: --resume auto"
                ),
                128 + stop,
            )
        mix(model, old, new, weight)
        measured = []
        for n, pairs in enumerate((run.validation, run.kept)):
            if pairs is not None:
                recall, loss, embedded = _measured(run, model, pairs, images[n])
                measured.append((recall.mean_recall, loss))
                images[n] = embedded if image_tower_unchanged else None
        (own, loss), *kept = measured
        mixtures.append(MixtureScore(weight, own, loss, kept[0][0] if kept else None))
    choice = choose(mixtures)
    run.log.record(
        MixturesEvent(progress.total, stage, choice.mixture.weight, choice.within, mixtures)
    )
    if not choice.within:
        text = _(
            "no mixture of stage {stage} gains without costing the kept pairs over 1 point",
            stage=stage,
        )
        run.log.record(WarningEvent(progress.total, _("{text}; the best is taken", text=text)))
    if run.kept is not None:
        what = _("kept pairs or images cannot be read, and are left out")
        run.warn(what, run.kept.skipped, f"unread-kept-{stage}.txt", progress.total)
    return choice.mixture.weight


def _measured(
    run: Run, model: CLIP, pairs: EvalSet, images: Vectors | None
) -> tuple[Retrieval, float, Vectors]:
    """Return the recall and the loss of a model, and the embeddings of the images."""
    images, texts = embed(
        model, pairs, autocast=run.score_dtype, images=images, between=run.stop_between
    )
    recall = distributed.on_main(lambda: score(images, texts, pairs))
    return recall, contrastive_loss(images, texts, pairs, model.logit_scale.exp()), images
