#!/bin/sh
# Create the virtual environment and install nsa_gen into it. `make` calls this; it needs Python 3.11+ and nothing else.
#
#   tools/setup.sh VENV          VENV/.installed is written last: its absence means the environment is not complete.
#
# PYTHON           the interpreter to build on (default: the first of python3, python3.13, 3.12, 3.11, 3.14 that is new enough)
# TORCH_PIP_ARGS   more arguments for the installation of torch on a machine without a GPU, such as
#                  "--index-url https://download.pytorch.org/whl/cpu"
set -eu
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/setup.sh VENV}

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

usable() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer with the venv module"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>/dev/null || printf 'no python3')
    fail "nsa_gen needs Python 3.11 or newer with the venv module; found $found. Install one (Debian and Ubuntu:" \
        "apt-get install python3.12 python3.12-venv) or name it: make PYTHON=/path/to/python3.12"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# True when the interpreter already has a torch and a triton that are new enough and see the GPU.
has_gpu_torch() {
    "$1" - >/dev/null 2>&1 <<'PYTHON'
import sys
import torch, triton
def version(text): return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
sys.exit(not (torch.cuda.is_available() and version(torch.__version__) >= (2, 11) and version(triton.__version__) >= (3, 6)))
PYTHON
}

python=$(find_python)
unfinished=$venv/.installing

# An environment of which a previous run of this script was interrupted, or whose interpreter is gone, is made anew.
# One that somebody else made is kept and completed.
if [ -e "$unfinished" ]; then
    say "the last installation into $venv did not finish: starting again"
    rm -rf "$venv"
elif [ -d "$venv" ] && ! usable "$venv/bin/python"; then
    say "$venv has no working Python 3.11 or newer: making it anew"
    rm -rf "$venv"
fi

site_packages=
if has_gpu && has_gpu_torch "$python"; then
    site_packages=--system-site-packages
fi

if [ ! -d "$venv" ]; then
    say "creating $venv with $("$python" --version) ${site_packages:+(using the torch that is already installed)}"
    mkdir -p "$venv"
    : >"$unfinished"
    if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        "$python" -m venv $site_packages "$venv"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv $site_packages --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip
    else
        fail "$python has neither ensurepip nor pip (Debian and Ubuntu: apt-get install python3-venv)"
    fi
fi
: >"$unfinished"
rm -f "$venv/.installed"

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if has_gpu; then
    say "installing nsa_gen (GPU found)"
    pip install --quiet --editable '.[bench,test]'
else
    # torch comes first and alone, so that its source of packages can differ from that of the rest.
    torch=$(sed -n 's/^\(torch==.*\)$/\1/p' constraints-cpu.txt)
    say "installing $torch (no GPU found)"
    # shellcheck disable=SC2086  # several arguments are meant to be several
    pip install --quiet ${TORCH_PIP_ARGS:-} "$torch"
    say "installing nsa_gen"
    pip install --quiet --constraint constraints-cpu.txt --editable '.[bench,test]'
fi

"$venv/bin/python" -c 'import torch, triton, nsa_gen' || fail "the installation in $venv does not import; see above"
rm -f "$unfinished"
: >"$venv/.installed"
say "done: $venv"
