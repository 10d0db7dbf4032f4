#!/bin/sh
# What the sentences and the text tower's depth give, on the 468 things after stage 1:
# after run.sh, sh recipes/mini/ablations.sh. What the data gives: ablations.py.
set -eu
recipe=$(dirname "$0")
python=mini/venv/bin/python

run() { # NAME FOLDER-OF-START STEPS OPTIONS...
    name=$1 start=$2 steps=$3
    shift 3
    test -d "mini/ablations/$name/final" || mini/venv/bin/cn-clip train --recipe mini \
        --start.checkpoint "$start/start" --output.folder "mini/ablations/$name" \
        --stages.locked.steps "$steps" --stages.locked.plateau off --stages.unlocked.steps 1 \
        --resume auto "$@"
    printf '%s ' "$name"
    $python benchmarks/things468.py --model "mini/ablations/$name/stages/1-locked" --json
}

run no-sentences mini 2600 --loss.sentences off
run layers-3 mini 400
for layers in 2 4; do
    test -d "mini/layers-$layers/start" || $python "$recipe/prepare.py" \
        --packages mini/packages --out "mini/layers-$layers" --layers "$layers"
    run "layers-$layers" "mini/layers-$layers" 400
done
