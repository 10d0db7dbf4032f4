"""Write annotations and predictions here, and what the official evaluators make of them.

    python tests/golden/eval/make.py PATH/TO/cn_clip   # of the official package, 1.6.0

Only its scripts in eval/ are run, as they are: transform_ir_annotation_to_tr.py, evaluation.py and
evaluation_tr.py.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def write(name, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (HERE / name).write_text(text, encoding="utf-8")


def main():
    official = Path(sys.argv[1]) / "eval"
    rng = random.Random(0)
    images, texts = range(1000, 1040), range(70, 100)
    truth = {text: sorted(rng.sample(images, rng.choice((1, 1, 2, 5)))) for text in texts}
    write(
        "texts.jsonl",
        (
            {"text_id": text, "text": f"第{text}条文本", "image_ids": found}
            for text, found in truth.items()
        ),
    )
    scripts = [sys.executable, "transform_ir_annotation_to_tr.py", "--input", "texts.jsonl"]
    run(official, scripts)
    turned = [json.loads(line) for line in (HERE / "texts.tr.jsonl").open(encoding="utf-8")]
    best = {text: guess(rng, images, found) for text, found in truth.items()}
    write("predictions.jsonl", ({"text_id": t, "image_ids": found} for t, found in best.items()))
    rows = [(each["image_id"], guess(rng, texts, each["text_ids"])) for each in turned]
    write("tr_predictions.jsonl", ({"image_id": i, "text_ids": found} for i, found in rows))
    for script, annotations, predictions, out in (
        ("evaluation.py", "texts.jsonl", "predictions.jsonl", "output.json"),
        ("evaluation_tr.py", "texts.tr.jsonl", "tr_predictions.jsonl", "tr_output.json"),
    ):
        run(official, [sys.executable, script, annotations, predictions, out])


def guess(rng, gallery, right):
    """Ten different ones; a right one among them more often than by chance."""
    found = rng.sample(gallery, 10)
    if rng.random() < 0.7 and not set(found) & set(right):
        found[rng.randrange(10)] = rng.choice(right)
    return found


def run(official, words):
    python, script, *rest = words
    subprocess.run([python, official / script, *rest], cwd=HERE, check=True)


if __name__ == "__main__":
    main()
