# shellcheck shell=bash
# Makes .venv in the repository root, or brings it up to date, and leaves it alone when there is nothing to do.
# Other scripts source this file and call `make_environment core`, or name an extra of setup.cfg in place of core; the
# variables root and venv then hold the two folders. `make_environment EXTRA FOLDER` makes another folder than .venv.
#
#   TRAINER_PYTHON   the Python to use, in place of the first fitting one on PATH
#
# setup.cfg has the range of every package, and requirements.lock the one version of each that is installed.
#
# This is written for bash 3.2, the newest that macOS has.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "Other scripts source environment.sh; run scripts/quickstart or scripts/test." >&2
    exit 2
fi

# CDPATH would make cd print, and pwd -P gives a moved or linked checkout one name.
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
lock=$root/requirements.lock
newest= # yes: install the newest versions that setup.cfg allows, and write the lock file anew

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

make_environment() {
    local extra=$1
    venv=$root/${2:-.venv}
    home_stamp=$venv/trainer.home # the path at which it was made: the programs in it carry that path
    read_python_range
    # A program on PATH may be only a shim, as with Python below: it counts only if it runs.
    has_uv=
    if uv --version </dev/null >/dev/null 2>&1; then has_uv=yes; fi

    discard_unusable_environment
    if is_installed "$extra"; then return; fi
    if [[ ! -e $venv/pyvenv.cfg ]]; then create_environment; fi
    install_trainer "$extra"
}

# Makes .venv again with the newest versions that setup.cfg allows, and writes these versions into the lock file. The
# oldest Python of the range is used: a version that runs on it runs on the newer ones too.
update_lock() {
    newest=yes
    read_python_range
    TRAINER_PYTHON=${TRAINER_PYTHON:-python3.$first_minor}
    make_environment "$1"
}

# Reads the range of Pythons from setup.cfg, its one home.
read_python_range() {
    local pattern='python_requires *= *>=3\.([0-9]+),<3\.([0-9]+)'
    [[ $(<"$root/setup.cfg") =~ $pattern ]] || fail "$root/setup.cfg: no python_requires of the form >=3.A,<3.B."
    first_minor=${BASH_REMATCH[1]}
    last_minor=$((BASH_REMATCH[2] - 1))
    range="3.$first_minor to 3.$last_minor"
}

python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' </dev/null 2>/dev/null
}

# Prints why a version does not fit, or nothing if it fits.
misfit() {
    local major=${1%%.*} minor=${1#*.}
    minor=${minor%%.*}
    if ((major < 3 || (major == 3 && minor < first_minor))); then
        echo "too old"
    elif ((major > 3 || minor > last_minor)); then
        echo "too new"
    fi
}

# --- an environment that exists ---

discard_unusable_environment() {
    if [[ ! -e $venv && ! -L $venv ]] || rmdir "$venv" 2>/dev/null; then return; fi
    local reason='' version='' wanted
    if ! version=$(python_version "$venv/bin/python"); then
        reason="its Python does not run"
    elif [[ -n $(misfit "$version") ]]; then
        reason="its Python is $version, $(misfit "$version") for trainer"
    elif [[ -e $home_stamp && $(<"$home_stamp") != "$venv" ]]; then
        reason="it was made as $(<"$home_stamp")"
    elif [[ -n ${TRAINER_PYTHON:-} ]] && wanted=$(python_version "$TRAINER_PYTHON") \
        && [[ ${wanted%.*} != "${version%.*}" ]]; then
        reason="its Python is $version, and TRAINER_PYTHON=$TRAINER_PYTHON is $wanted"
    elif [[ -n $newest ]]; then
        reason="it has the versions of $lock"
    fi
    if [[ -z $reason && -e $venv/pyvenv.cfg ]]; then return; fi
    if [[ ! -e $venv/pyvenv.cfg && ! -e $home_stamp ]]; then
        fail "$venv is in the way: it is not a virtual environment. Move it elsewhere, then run this again."
    fi
    echo "Making ${venv##*/} again: $reason."
    find_python # before anything is removed
    rm -rf "$venv"
}

# Prints a hash of what determines an install, except the extra, which is in the stamp's name.
fingerprint() {
    "$venv/bin/python" -I -c '
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.version.encode())
for path in sys.argv[1:]:
    digest.update(hashlib.sha256(pathlib.Path(path).read_bytes()).digest())
print(digest.hexdigest())' "$root/setup.cfg" "$root/pyproject.toml" "$lock"
}

installed_stamp() {
    echo "$venv/trainer.installed.$1"
}

is_installed() {
    local stamp current
    [[ -e $home_stamp ]] && current=$(fingerprint) || return 1
    for stamp in "$(installed_stamp "$1")" "$venv"/trainer.installed.*; do
        # Every extra includes the core.
        if [[ $1 != core && $stamp != "$(installed_stamp "$1")" ]]; then continue; fi
        if [[ -e $stamp && $(<"$stamp") == "$current" ]]; then return 0; fi
    done
    return 1
}

# --- a new environment ---

# Sets the variable python. Plain python3 is the user's choice (an active environment, pyenv, conda), and on Debian the
# Python that has its venv package; so it goes before newer ones.
find_python() {
    local candidates=(python3) minor name path version problem refused='' newline=$'\n'
    local without_venv='' without_venv_version=''
    if [[ -n ${python:-} ]]; then return; fi
    for ((minor = last_minor; minor >= first_minor; minor--)); do candidates+=("python3.$minor"); done
    candidates+=(python)
    if [[ -n $has_uv ]] && path=$(uv python find --no-python-downloads ">=3.$first_minor,<3.$((last_minor + 1))" \
        2>/dev/null </dev/null); then
        candidates+=("$path") # uv also finds Pythons that are not on PATH
    fi
    if [[ -n ${TRAINER_PYTHON:-} ]]; then candidates=("$TRAINER_PYTHON"); fi

    for name in "${candidates[@]}"; do
        path=$(command -v "$name") || continue
        # pyenv puts a shim on PATH for every Python it has, also for those that are switched off: these fail when run.
        if ! version=$(python_version "$path"); then
            problem="does not run"
        else
            problem=$(misfit "$version")
            problem=${problem:+is Python $version, $problem}
        fi
        if [[ -n $problem ]]; then
            refused+="${refused:+$newline}  $path $problem"
        elif [[ -z $has_uv ]] && ! "$path" -c 'import venv, ensurepip' </dev/null >/dev/null 2>&1; then
            without_venv=${without_venv:-$path}
            without_venv_version=${without_venv_version:-${version%.*}}
        else
            python=$path
            return
        fi
    done

    if [[ -n $without_venv ]]; then
        fail "$without_venv (Python $without_venv_version) cannot make virtual environments:" \
            "its venv module (ensurepip) is missing." \
            "  Debian, Ubuntu: sudo apt install python$without_venv_version-venv" \
            "  without root: install uv, or set TRAINER_PYTHON to a complete Python $range"
    fi
    if [[ -n ${TRAINER_PYTHON:-} ]]; then
        fail "TRAINER_PYTHON=$TRAINER_PYTHON is not usable; trainer needs Python $range." \
            "${refused:-  there is no such program}"
    fi
    fail "trainer needs Python $range, and found none." "${refused:-  there is no python3 or python on PATH}" \
        "Install one, or set TRAINER_PYTHON to one that is not on PATH:" \
        "  Debian, Ubuntu: sudo apt install python3 python3-venv (if its python3 is in that range)" \
        "  macOS: brew install python@3.$last_minor" \
        "  without root: uv python install 3.$last_minor"
}

create_environment() {
    local log
    find_python
    if [[ -n $has_uv ]]; then
        log=$(LC_ALL=C uv venv --python "$python" "$venv" 2>&1 </dev/null) || explain_failure "$log"
    else
        log=$(LC_ALL=C "$python" -m venv "$venv" 2>&1 </dev/null) || explain_failure "$log"
    fi
}

install_trainer() {
    local extra=$1 log installer requirement started=$SECONDS
    requirement=".[$extra]"
    if [[ $extra == core ]]; then requirement=.; fi
    # An install that is interrupted from here on counts as not done.
    rm -f "$venv"/trainer.installed.*
    printf '%s\n' "$venv" >"$home_stamp" || explain_failure "No space left on device"
    echo "Installing gpt-trainer ($extra) into ${venv##*/}; the first time this takes some minutes."
    if [[ -n $has_uv ]]; then
        # pip compiles too. Without it every first start is slow, and each start if Python may not write. Of PyTorch, an
        # extra's, uv can take the small build for a CPU; on Linux pip takes the one with CUDA, which works too.
        export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-cpu}
        installer=(uv pip install --compile-bytecode --python "$venv/bin/python")
    else
        # uv makes environments without pip.
        if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
            log=$("$venv/bin/python" -m ensurepip 2>&1 </dev/null) || explain_failure "$log"
        fi
        installer=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off)
    fi
    if [[ -z $newest ]]; then
        installer+=(--constraint "$lock")
    elif [[ -z $has_uv ]]; then
        installer+=(--upgrade --upgrade-strategy eager) # an old setuptools may have come with the environment
    fi
    # LC_ALL: explain_failure reads English. PIP_USER: a pip.conf may ask for --user, which fails in an environment.
    log=$(cd "$root" && LC_ALL=C PIP_USER=0 "${installer[@]}" --editable "$requirement" 2>&1 </dev/null) \
        || explain_failure "$log"
    if [[ -n $newest ]]; then write_lock; fi
    fingerprint >"$(installed_stamp "$extra")"
    echo "Installed in $((SECONDS - started)) s."
}

# Writes the version of every package in .venv into the lock file, except trainer's own and the installer's.
write_lock() {
    "$venv/bin/python" -I -c '
import pathlib, re, sys
from importlib import metadata
versions = {re.sub("[-_.]+", "-", each.metadata["Name"]).lower(): each.version for each in metadata.distributions()}
pins = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in ("gpt-trainer", "pip")]
path = pathlib.Path(sys.argv[1])
header = [line for line in path.read_text().splitlines() if line.startswith("#")]
path.write_text("".join(f"{line}\n" for line in header + pins))' "$lock"
}

explain_failure() {
    local network='NewConnectionError|ConnectTimeout|Connection refused|Connection reset|timed out|name resolution'
    network+='|Name or service not known|nodename nor servname|Network is unreachable|No route to host|ProxyError'
    network+='|SSLError|CERTIFICATE|error sending request|dns error|client error \(Connect\)|Failed to fetch'
    # This is all that pip prints without retries; an index that can be reached has setuptools.
    network+='|requirement setuptools.*from versions: none'
    local mismatch='No matching distribution|No solution found|not a supported wheel|compatible wheel'
    mismatch+='|for the current platform'
    printf '%s\n' "$1" | tail -n 20 >&2
    echo >&2
    if grep -qiE 'No space left on device|Disk quota exceeded|os error (28|122)\b' <<<"$1"; then
        df -h "$root" "${TMPDIR:-/tmp}" >&2 || true
        fail "The disk is full. Make room, or set TMPDIR to a folder on a larger disk; then run this again."
    elif grep -qE "$network" <<<"$1"; then
        fail "The package index cannot be reached. Check the network, then run this again." \
            "  behind a proxy: set HTTPS_PROXY" \
            "  with an index of your own: set PIP_INDEX_URL, or UV_DEFAULT_INDEX for uv, which ignores pip's settings"
    elif grep -qE "$mismatch" <<<"$1"; then
        fail "The package index has no build of something trainer needs (named above) for this machine:" \
            "$(uname -sm), Python $(python_version "$venv/bin/python")." \
            "Linux and macOS arm64 have all of them; on Windows use WSL2."
    fi
    fail "Installing failed; the last lines above have the reason. Mend it, then run this again."
}
