"""A tiny dataset in the official layout."""

from pathlib import Path

from conftest import make_image


def write_labelled(root: Path, labels=("猫", "狗", "鸟"), folders=("000", "001", "002")) -> Path:
    """Two images per class in ``test``, with names unique across classes."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "label_cn.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    for number, name in enumerate(folders):
        folder = root / "test" / name
        folder.mkdir(parents=True)
        for at in range(2):
            make_image(2 * number + at).save(folder / f"{2 * number + at}.jpg")
    return root
