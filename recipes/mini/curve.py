"""Learning curve of stage 1: the averaged weights of a run's checkpoints, on the 468 things:

    cn-clip train --recipe mini --output.keep 100
    python recipes/mini/curve.py --run mini/run

Each row of the table has a step, R@1, R@5 and R@10 of text to image and of image to text, and the
mean recall on the held-out drawings from the run's log.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from cn_clip import weights
from cn_clip.train.run.checkpoint import load_tensors, read_progress, states
from cn_clip.train.run.log import read_log

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import things468


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; downloaded by default")
    options = parser.parse_args()
    events = [event for event in read_log(options.run) if event["kind"] == "score"]
    validation_names = {event["total"]: event["mean_recall"] for event in events}
    model = weights.build(weights.read(options.run / "start"))
    state = model.state_dict()
    text_state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things468.things(options.stamps or things468.fetch(Path(scratch)))
        for path in states(options.run):
            progress = read_progress(path)
            if progress.stage > 0 or progress.total not in validation_names or not progress.total:
                continue
            load_tensors(path, {"average": text_state})
            folder = Path(scratch) / path.name
            weights.save_weights(model.config, state, folder)
            cells = [*map(things468.cell, things468.measure(str(folder), pairs).values())]
            drawings = 100 * validation_names[progress.total]
            print(f"| {progress.total:,} | {cells[0]} | {cells[1]} | {drawings:.1f} |", flush=True)


if __name__ == "__main__":
    main()
