#!/usr/bin/env bash
# Make the outputs of an earlier version that tests/test_old_outputs.py reads:
#   tests/old_outputs/make.sh CHECKOUT   (a checkout of that version in which `make test` has run)
# Those that are here were made by 967ae92, the last version before the packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"
python=.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A random Qwen3 of 4 layers with a small tokenizer, as that version's own tests make them.
"$python" - "$work/source" <<'PYTHON'
import sys
from pathlib import Path


from tests.conftest import make_model
from tests.ggufs import make_bpe_tokenizer

folder = Path(sys.argv[1])
make_model(folder, "qwen3", hidden_size=32, intermediate_size=32, max_position_embeddings=512)
make_bpe_tokenizer(folder)
PYTHON
hybridize() { "$python" -m converter "$@" -q >/dev/null; }
measure=(--window 16 --length 320 --samples 4 --validation 4 --budget 1/4)
rm -rf "$here"/{scores*.json,plan.json,checkpoint.tar.gz,model.gguf}
hybridize calibrate "$work/source" --out "$here/scores.json" "${measure[@]}"
hybridize calibrate "$work/source" --out "$here/scores-raced.json" "${measure[@]}" --method nll-restore
hybridize calibrate "$work/source" --out "$here/scores-beam.json" "${measure[@]}" --method beam
hybridize calibrate "$work/source" --out "$here/scores-lazy.json" "${measure[@]}" --method lazy
hybridize plan "$work/source" --scores "$here/scores.json" --budget 1/2 --out "$here/plan.json"
hybridize convert "$work/source" "$work/checkpoint" --scores "$here/scores.json" --budget 1/4
hybridize export "$work/checkpoint" "$here/model.gguf" --type f16
tar --sort=name --owner=0 --group=0 -C "$work" -czf "$here/checkpoint.tar.gz" checkpoint
