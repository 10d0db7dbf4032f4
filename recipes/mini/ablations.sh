#!/bin/sh
# What each part of the recipe gives: shorter runs, each with one thing left out or changed, scored on
# the 468 things after stage 1. After run.sh: sh recipes/mini/ablations.sh
set -eu
recipe=$(dirname "$0")
python=mini/venv/bin/python

run() { # NAME FOLDER-WITH-DATA OPTIONS...
    name=$1 data=$2
    shift 2
    test -d "mini/ablations/$name/final" || mini/venv/bin/cn-clip train --recipe mini \
        --train-data "jsonl:$data/train.jsonl" --val-data "jsonl:$data/val.jsonl" \
        --start.checkpoint "$data/start" \
        --loss.sentences "$data/sentences" --output.folder "mini/ablations/$name" \
        --stages.locked.steps 400 --stages.locked.plateau off --stages.unlocked.steps 1 \
        --resume auto "$@"
    printf '%s ' "$name"
    $python benchmarks/things468.py --model "mini/ablations/$name/stages/1-locked" --json
}

prepared() { # FOLDER OPTIONS...
    folder=$1
    shift
    test -d "$folder/start" ||
        $python "$recipe/prepare.py" --packages mini/packages --out "$folder" "$@"
}

run whole mini
run no-distillation mini --loss.sentences off
for what in clip-art synonyms looks; do
    prepared "mini/without-$what" --without "$what"
    run "no-$what" "mini/without-$what"
done
for layers in 2 4; do
    prepared "mini/layers-$layers" --layers "$layers"
    run "layers-$layers" "mini/layers-$layers"
done
