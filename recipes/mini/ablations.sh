#!/bin/sh
# Ablations of text distillation and of the depth of the text tower, on the 468 things after 1,000
# steps of stage 1. Run after run.sh: sh recipes/mini/ablations.sh. Options, such as --device cuda,
# are passed on. Ablations of the data: ablations.py.
set -eu
recipe=$(dirname "$0")
python=mini/venv/bin/python

run() { # NAME FOLDER-OF-START OPTIONS...
    name=$1 start=$2
    shift 2
    test -d "mini/ablations/$name/final" || mini/venv/bin/cn-clip train --recipe mini \
        --start.checkpoint "$start/start" --output.folder "mini/ablations/$name" \
        --stages.locked.steps 1000 --stages.locked.early-stopping off --stages.unlocked.steps 1 \
        --resume auto "$@"
    printf '%s ' "$name"
    $python benchmarks/things468.py --model "mini/ablations/$name/stages/1-locked"
}

run layers-3 mini "$@"
run no-sentences mini --loss.text_targets off "$@"
for layers in 2 4; do
    test -d "mini/layers-$layers/start" || $python "$recipe/prepare.py" \
        --packages mini/packages --out "mini/layers-$layers" --layers "$layers"
    run "layers-$layers" "mini/layers-$layers" "$@"
done
