"""Options of a recipe that were renamed: the old name is refused with the new one."""

from __future__ import annotations

from collections.abc import Collection

from cn_clip.errors import UsageError
from cn_clip.translation import _

# The last part of the old name to that of the new one, within the same table.
RENAMED = {
    "most_skipped": "max_skipped_fraction",
    "plateau": "early_stopping",
    "for_batch": "reference_batch_size",
    "clip_norm": "max_grad_norm",
    "rates": "lr_multipliers",
    "sentences": "text_targets",
    "sentences_weight": "text_targets_weight",
    "sentences_batch_size": "text_targets_batch_size",
}


def refuse_renamed(key: str, known: Collection[str], prefix: str) -> None:
    """Raise a ``UsageError`` if ``key`` is the old name of one of the ``known`` options of a table.

    ``prefix`` comes before both names in the message.
    """
    new = RENAMED.get(key)
    if new in known:
        raise UsageError(
            _(
                "{prefix}{key} is now {prefix}{new}; write the new name",
                prefix=prefix,
                key=key,
                new=new,
            )
        )
