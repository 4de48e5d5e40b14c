#!/usr/bin/env bash
# Unpack parts of a bundle: `scripts/gpu/unpack.sh PART... TARGET`. It needs nothing but Python (PYTHON, or python3).
#
# Parts may be unpacked one after the other; the first one is needed first. The output are the variables to set. They are
# also in TARGET/env.sh.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/unpack.py" "$@"
