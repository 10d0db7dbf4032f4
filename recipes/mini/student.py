"""Distillation of the text tower: a small BERT learns where the teacher puts each text.

The loss is the cosine distance to the target, plus how far the similarities within a batch are
from the teacher's (relational distillation, Park et al., 2019, arXiv:1904.05068, with a softmax
over each row as in Tung & Mori, 2019, arXiv:1907.09682).
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import TextConfig
from cn_clip.model.text import Bert
from cn_clip.tokenizer import CONTEXT_LENGTH, Tokenizer

TEXT = TextConfig(
    hidden_size=256,
    layers=4,
    heads=4,
    intermediate_size=1024,
    max_positions=64,
    dropout=0.0,
)
RELATION_SCALE = 20.0  # sharpens similarities, so that near neighbours count most
COSINE_WEIGHT = 4.0
PEAK_LEARNING_RATE = 2e-3
WARM_UP = 200
DECAY_STEPS = 4000  # the cosine that the rate follows until it cools down
COOL_DOWN = 500  # last steps, in which the rate falls to zero in a line
CHECKPOINT_EVERY = 200
BUCKET = 32  # batches that are sorted by length together


class Student(nn.Module):
    """(B, L) ids to (B, embed_dim) features, under the names that `CLIP` gives its text tower."""

    def __init__(self, embed_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.bert = Bert(TEXT)
        self.text_projection = nn.Parameter(torch.empty(TEXT.hidden_size, embed_dim))
        nn.init.normal_(self.text_projection, std=TEXT.hidden_size**-0.5, generator=generator)
        for module in self.bert.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.04, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids, (ids != 0)[:, None, None])[:, 0].float() @ self.text_projection


def start_from_tokens(student: Student, tokens: Tensor, targets: np.ndarray) -> None:
    """Word embeddings start as the principal components of what the teacher says of each token."""
    centred = targets - targets.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    reduced = targets @ axes[: TEXT.hidden_size].T
    reduced *= 0.03 / reduced.std()
    with torch.no_grad():
        student.bert.embeddings.word_embeddings.weight[tokens] = torch.from_numpy(reduced).float()


def batches(
    lengths: np.ndarray, repeats: np.ndarray, size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch of batches of texts of similar length; text i comes `repeats[i]` times."""
    pool = rng.permutation(np.repeat(np.arange(len(lengths)), repeats))
    found = []
    for start in range(0, len(pool), size * BUCKET):
        chunk = pool[start : start + size * BUCKET]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        found += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
    rng.shuffle(found)
    return found


def rate_at(step: int, steps: int) -> float:
    """Learning rate: warm-up, a slow cosine, and a linear cool-down at the end."""
    cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / DECAY_STEPS))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / COOL_DOWN) * cosine


def train(
    student: Student,
    texts: Sequence[str],
    targets: np.ndarray,
    repeats: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    checkpoint: Path,
) -> None:
    """Distil in place. `targets` (N, D) are unit vectors; prints the cosine as it goes.

    An interrupted run goes on from `checkpoint`, with batches drawn anew.
    """
    tokenizer = Tokenizer()
    rows = tokenizer.encode(texts, CONTEXT_LENGTH)
    lengths = np.array([len(row) for row in rows])
    goal = torch.from_numpy(targets).float()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    rng = np.random.default_rng((seed, first))
    queue: list[np.ndarray] = []
    student.train()
    started, seen = time.monotonic(), 0.0
    for step in range(first, steps):
        queue = queue or batches(lengths, repeats, batch_size, rng)
        batch = queue.pop()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        ids = torch.from_numpy(tokenizer.pad([rows[i] for i in batch], int(lengths[batch].max())))
        with torch.autocast("cpu", torch.bfloat16):
            features = student(ids)
        embeddings, wanted = F.normalize(features.float(), dim=-1), goal[batch]
        distance = (1 - (embeddings * wanted).sum(-1)).mean()
        relations = F.kl_div(
            F.log_softmax(RELATION_SCALE * embeddings @ wanted.T, -1),
            F.softmax(RELATION_SCALE * wanted @ wanted.T, -1),
            reduction="batchmean",
        )
        loss = COSINE_WEIGHT * distance + relations
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        seen += float(distance.detach())
        if (step + 1) % 100 == 0:
            passed = time.monotonic() - started
            print(
                f"  step {step + 1}/{steps}  cosine {1 - seen / 100:.4f}  {passed:.0f} s",
                flush=True,
            )
            seen = 0.0
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    student.eval()


def embed(student: Student, texts: Sequence[str]) -> np.ndarray:
    """(N, D) float32 unit vectors."""
    tokenizer, found = Tokenizer(), []
    with torch.no_grad():
        for start in range(0, len(texts), 256):
            rows = tokenizer.encode(list(texts[start : start + 256]))
            ids = torch.from_numpy(tokenizer.pad(rows, max(map(len, rows))))
            found.append(F.normalize(student(ids), dim=-1))
    return torch.cat(found).numpy()
