#!/bin/sh
# From packages to a trained model, in the folder mini/: sh recipes/mini/run.sh
# Broken off, the same command goes on. What it needs: Python, npm, apt-get and dpkg, 1 GB of disk.
set -eu
recipe=$(dirname "$0")
packages=mini/packages

python3 -m venv mini/venv
mini/venv/bin/pip install -c constraints.txt -e '.[data]' -r "$recipe/requirements.txt"

mkdir -p "$packages/debian"
npm install --prefix "$packages" --no-save --no-audit --no-fund --ignore-scripts \
    @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \
    @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3 \
    cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0
(
    cd "$packages/debian"
    for name in openclipart-png pysiogame; do
        test -d "$name" || { apt-get download "$name" && dpkg -x "$name"_*.deb "$name"; }
    done
)

mini/venv/bin/python "$recipe/prepare.py" --packages "$packages" --out mini
mini/venv/bin/cn-clip train --recipe mini --resume auto
