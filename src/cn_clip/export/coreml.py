"""Both towers as Core ML models. They are converted here, and run only on Apple's systems."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export.graphs import towers
from cn_clip.export.quiet import quiet
from cn_clip.model.clip import CLIP
from cn_clip.translation import _

FOLDER = "coreml"
_MAX_BATCH = 64
_MARK = (
    "Converted by cn-clip, never run by it: Core ML needs macOS or iOS. Compare the embeddings "
    "with golden/golden.json before use."
)


def check_coremltools() -> None:
    """Raise a ``UsageError`` if coremltools is not installed."""
    if importlib.util.find_spec("coremltools") is None:
        raise UsageError(
            _("--to coreml needs coremltools, which is not installed: pip install coremltools")
        )


def write_coreml(model: CLIP, folder: Path, precision: str) -> None:
    """Write ``image.mlpackage`` and ``text.mlpackage`` to a folder, for iOS 17 and macOS 14.

    Inputs are float32 ``pixel_values`` (batch, 3, S, S) and int32 ``input_ids`` (batch, length), 0
    for padding; outputs are float32 ``image_features`` and ``text_features`` (batch, D). A batch
    has at most 64 rows.

    Args:
        model: in float32.
        folder: to be written.
        precision: ``"float32"`` or ``"float16"``, of the weights and of the computation.

    Raises:
        CheckpointError: coremltools cannot convert the model.
    """
    folder.mkdir()
    for name, tower in zip(("image", "text"), towers(model, _MAX_BATCH), strict=True):
        with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            program = torch.export.export(
                tower.module, (tower.example,), dynamic_shapes=(tower.axes,)
            )
            converted = _converted(program, f"{name}_features", precision)
            converted.short_description = _MARK
            converted.save(str(folder / f"{name}.mlpackage"))
    (folder / "README.txt").write_text(_MARK + "\n", encoding="utf-8")


def _converted(program: torch.export.ExportedProgram, output: str, precision: str) -> Any:
    import coremltools as ct
    import numpy as np

    compute = {"float32": ct.precision.FLOAT32, "float16": ct.precision.FLOAT16}[precision]
    try:
        return ct.convert(
            program.run_decompositions({}),
            outputs=[ct.TensorType(name=output, dtype=np.float32)],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=compute,
            skip_model_load=True,
        )
    except Exception as error:  # of a third-party converter, which raises nearly every kind
        raise CheckpointError(
            _(
                "coremltools {version} cannot convert the model traced by torch {torch_version} "
                "({error_type}: {error}); install versions that fit",
                version=ct.__version__,
                torch_version=torch.__version__,
                error_type=type(error).__name__,
                error=error,
            )
        ) from error
