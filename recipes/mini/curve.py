"""How stage 1 learns: the averaged weights of a run's states, on the 468 things:

    cn-clip train --recipe mini --output.keep 100
    python recipes/mini/curve.py --run mini/run

Each row of the table has a step, R@1, R@5 and R@10 of text to image and of image to text, and the
mean recall on the drawings held out, as the run measured it.
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
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; fetched if not given")
    options = parser.parse_args()
    events = [event for event in read_log(options.run) if event["kind"] == "score"]
    held_out = {event["total"]: event["mean_recall"] for event in events}
    model = weights.build(weights.read(options.run / "start"))
    state = model.state_dict()
    learned = {name: at for name, at in state.items() if not name.startswith("visual.")}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things468.things(options.stamps or things468.fetch(Path(scratch)))
        for path in states(options.run):
            progress = read_progress(path)
            if progress.stage > 0 or progress.total not in held_out or not progress.total:
                continue
            load_tensors(path, {"average": learned})
            folder = Path(scratch) / path.name
            weights.save_weights(model.config, state, folder)
            cells = [*map(things468.cell, things468.measure(str(folder), pairs).values())]
            drawings = 100 * held_out[progress.total]
            print(f"| {progress.total:,} | {cells[0]} | {cells[1]} | {drawings:.1f} |", flush=True)


if __name__ == "__main__":
    main()
