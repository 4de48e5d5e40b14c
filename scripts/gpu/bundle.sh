#!/usr/bin/env bash
# Pack what a machine with PyTorch, but without a network, needs to run PriorZero: `scripts/gpu/bundle.sh [OUT_DIR]`.
#
# OUT_DIR (.gpu by default) then contains part1, part2, ..., which `scripts/gpu/unpack.sh` unpacks on that machine.
# bundle.py says what is in them. PYTHON: the Python to pack with; the one of .venv by default, which is then set up.
set -euo pipefail
case ${1:-} in
-*) echo "usage: bundle.sh [OUT_DIR] (a folder for the parts; .gpu by default)" >&2; exit 2 ;;
esac
out=$(realpath -m -- "${1:-$(dirname "${BASH_SOURCE[0]}")/../../.gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${PYTHON:-}" ]; then
    scripts/set_up.sh cpu
    PYTHON=.venv/bin/python
fi
exec "$PYTHON" scripts/gpu/bundle.py "$out"
