# Sourced by demo, test, check and benchmark: `ready dev`, `ready run` or `ready bench` leaves a .venv (.venv-bench) with the project in it,
# made or refreshed only when needed, and its interpreter in $python. For bash 3.2 (macOS) and newer.
# PYTHON=/path/to/python3.12 scripts/test names the interpreter to make .venv with.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv${venv_suffix:-}
python=$venv/bin/python
stamp=$venv/installed
log=$venv/install.log

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit 2
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Why MLX has no wheel for this machine, in one line, or nothing.
unsupported() {
    "$1" - <<'EOF'
import platform

system, machine = platform.system(), platform.machine()
if system == "Darwin" and machine != "arm64":
    print("MLX needs Apple silicon and a native (arm64) Python; this Python is " + machine)
elif system == "Darwin" and int(platform.mac_ver()[0].split(".")[0]) < 14:
    print("MLX needs macOS 14 or newer; this is " + platform.mac_ver()[0])
elif system == "Linux":
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        print("MLX needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12); this is " + ((name + " " + version).strip() or "not glibc"))
elif system != "Darwin":
    print("MLX needs macOS on Apple silicon, or Linux; this is " + system)
EOF
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python3.14; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

make_venv() {
    local base reason
    base=$(find_python)
    if [ -n "${PYTHON:-}" ] && [ "$base" != "$PYTHON" ]; then die "PYTHON=$PYTHON is not a Python 3.11 or newer"; fi
    [ -n "$base" ] || die "no Python 3.11 or newer found: install one (python.org; brew install python@3.12; apt install python3 python3-venv), or name it: PYTHON=/path/to/python"
    reason=$(unsupported "$base")
    [ -z "$reason" ] || die "$reason"
    say "making .venv with $("$base" -V 2>&1)"
    if "$base" -m venv --clear "$venv" >/dev/null 2>&1; then return; fi
    if command -v uv >/dev/null && uv venv --quiet --clear --python "$base" "$venv"; then return; fi
    rm -rf -- "$venv"
    "$base" -c 'import ensurepip' >/dev/null 2>&1 ||
        die "this Python lacks its venv module: apt install python3-venv (Debian, Ubuntu), or install uv"
    die "cannot make $venv: is the directory writable, the disk full?"
}

pip_install() {
    cd -- "$root" || return
    if "$python" -c 'import pip' >/dev/null 2>&1; then
        "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --retries 2 -e "$1"
    else # uv makes environments without pip
        uv pip install --python "$python" -e "$1"
    fi
}

install() { # $1: what pip installs
    local reason
    say "installing into .venv (about 200 MB to download; a minute or two on a good line)"
    if (pip_install "$1") >"$log" 2>&1 </dev/null; then return; fi
    if grep -qiE 'NewConnectionError|NameResolution|name resolution|Network is unreachable|Timeout|timed out|ProxyError|SSLError|error sending request' "$log"; then
        die "the Python package index cannot be reached: check the network or proxy and run this again (log: $log)"
    fi
    reason=$(grep -E 'No matching distribution|No space left|Permission denied' "$log" || grep -i 'error' "$log") || reason="no reason given"
    die "installing failed: $(printf '%s\n' "$reason" | tail -n 1 | sed 's/^ *//') (log: $log)"
}

# MLX's CPU wheel for Linux carries the reference BLAS. An OpenBLAS that happens to be here multiplies float32 matrices
# many times faster; nothing needs it.
preload_fast_blas() {
    local found
    [ "$(uname -s)" = Linux ] && [ -z "${MLX_DMPO_NO_PRELOAD:-}" ] || return 0
    found=$(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null | awk '/libopenblas\.so\.0 .*libc6,/ && !path {path = $NF} END {print path}') || return 0
    [ -n "$found" ] || return 0
    export LD_PRELOAD="$found${LD_PRELOAD:+:$LD_PRELOAD}"
    say "matrix products by $found (MLX_DMPO_NO_PRELOAD=1 turns this off)"
}

ready() { # $1: dev (tests and checks too), bench (the benchmark's rivals too) or run
    local key installed
    if [ -e "$venv" ] && ! [ -e "$venv/pyvenv.cfg" ]; then
        die "$venv is in the way: it is no virtual environment; move it elsewhere"
    fi
    "$python" -c '' >/dev/null 2>&1 || make_venv
    new_enough "$python" || die ".venv holds $("$python" -V 2>&1), and 3.11 is needed: remove $venv and run this again"
    # what was installed: from which pyproject.toml, where (an editable install points there), and which extra
    key="$(cksum <"$root/pyproject.toml") $root"
    installed=$(cat "$stamp" 2>/dev/null || true)
    if [ "$installed" = "dev $key" ] || [ "$installed" = "$1 $key" ]; then return; fi
    rm -f "$stamp"
    if [ "$1" = run ]; then install .; else install ".[$1]"; fi
    printf '%s\n' "$1 $key" >"$stamp"
}
