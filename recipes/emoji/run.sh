#!/bin/sh
# From packages to report.html, in a folder of its own (by default emoji/): sh recipes/emoji/run.sh
set -eu
folder=${1:-emoji}
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -c constraints.txt -e . -r recipes/emoji/requirements.txt
npm install --prefix "$folder/packages" --no-save --no-audit --no-fund --ignore-scripts \
    @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
    @iconify-json/emojione@1.2.3 cldr-annotations-full@48.2.0
"$folder/venv/bin/python" recipes/emoji/prepare.py --packages "$folder/packages" --out "$folder/data"
"$folder/venv/bin/cn-clip" train --recipe recipes/emoji/emoji.toml \
    --train-data "jsonl:$folder/data/train.jsonl" --val-data "jsonl:$folder/data/val.jsonl" \
    --image "$folder/data/image_tower" --output.folder "$folder/run" --resume auto
