#!/usr/bin/env bash
# Builds .venv for this checkout. `make` runs it whenever the set-up is missing or out of date.
# The first run takes about five minutes, most of it spent on downloading PyTorch; the whole log is in .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
log=.venv/setup.log

say() { printf 'setup: %s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "fastafd needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12"
    exit 1
fi

# One Debian package a line: venv makes .venv, the compiler and headers build FFCV and are what torch.compile calls.
missing_packages() {
    local name header
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    "$python" -c 'import ensurepip' 2>/dev/null || echo "$name-venv"
    [ -e "$header" ] || echo "$name-dev"
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@" </dev/null; }

pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 |
        tee -a "$log" |
        sed -unE '/(Downloading|Using cached) .*MB\)|^(Building|Installing|Successfully|ERROR)/ s/^ *(.{1,110}).*/  \1/p'
}

mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if "${as_root[@]}" true 2>/dev/null; then
        say "installing system packages: ${missing[*]}"
        apt update >/dev/null || true
        # of some 1,500 lines: what is to be fetched, and every hundredth as a sign of life
        apt install -y --no-install-recommends "${missing[@]}" | sed -un 's/^/  /; /Need to get/p; 0~100p' || true
        mapfile -t missing < <(missing_packages)
    fi
fi
if [ ${#missing[@]} -gt 0 ]; then
    say "system packages are missing; to add them: sudo apt-get install -y ${missing[*]} && make -B setup"
fi

if [ ! -x .venv/bin/pip ]; then
    say "creating .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        say "there is no .venv without the system packages named above"
        exit 1
    fi
fi

say "installing fastafd and what it needs"
: >"$log"
if ! pip_install -e '.[plot,tensorboard,docs,dev]'; then
    say "pip failed; the end of $log says why:"
    tail -n 20 "$log"
    exit 1
fi

install_ffcv() {
    [ ${#missing[@]} -eq 0 ] || return
    say "building FFCV"
    pip_install -e '.[ffcv]' && .venv/bin/python -c 'import ffcv' >>"$log" 2>&1
}

if install_ffcv; then
    say "done in $SECONDS s"
else
    say "done in $SECONDS s, without FFCV (see above and $log): the resident loader will be used"
fi
