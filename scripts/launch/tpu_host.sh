# shellcheck shell=bash
# The texts that scripts/launch/tpu has a TPU's hosts run; their login shell is bash. Each function prints one.

functions_text() {
    cat <<'END'
set -euo pipefail

is_training() {
    pgrep -F trainer/train.pid -f 'bin/trainer train' >/dev/null 2>&1
}

check_is_free() {
    if is_training; then
        echo "A training runs here; scripts/launch/tpu stop ends it." >&2
        exit 1
    fi
}

# Prints local, or for a slice the address of each host's server.
find_servers() {
    local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints hosts
    hosts=$(curl -sf --max-time 20 -H 'Metadata-Flavor: Google' "$url") || hosts=
    case $hosts in
        *,*) sed -E 's|[^:,]*:[^:,]*:([^:,]+)[^,]*|grpc://\1:8470|g' <<<"$hosts" ;;
        *) echo local ;;
    esac
}

# Starts a command that needs no connection, and follows its first seconds: most mistakes show by then.
start() {
    local name=$1 pid
    if [[ -e $name.log ]]; then mv -f "$name.log" "$name.log.before"; fi
    : >"$name.log"
    rm -f "$name.status"
    (
        trap '' HUP
        status=0
        # shellcheck disable=SC2016 # expanded by that bash
        setsid nohup bash -c 'echo $$ >"$0.pid"; exec "$@"' "$name" "${@:2}" || status=$?
        echo "$status" >"$name.status"
        exit "$status"
    ) >>"$name.log" 2>&1 </dev/null &
    pid=$!
    timeout 20 tail -n +1 -f --pid="$pid" "$name.log" || true
    if kill -0 "$pid" 2>/dev/null; then return; fi
    wait "$pid" # fails with the command's status
    exit
}
END
}

install_text() {
    functions_text
    cat <<'END'
check_is_free
mkdir -p trainer
tar -xzf trainer.tar.gz -C trainer
python3 -m pip install --user --quiet uv
~/.local/bin/uv python install "$1"
TRAINER_PYTHON=$(~/.local/bin/uv python find --system --managed-python "$1")
export TRAINER_PYTHON
trainer/scripts/launch/install_tpu
cd trainer
if [[ $(find_servers) != local ]] && ! pgrep -F server.pid -f start_grpc_tpu_worker >/dev/null 2>&1; then
    umask 077 # The server keeps this host's copy of the data below TMPDIR.
    start server .venv-tpu/bin/start_grpc_tpu_worker
fi
END
}

begin_text() {
    functions_text
    cat <<'END'
check_is_free
if [[ ! -x trainer/.venv-tpu/bin/trainer ]]; then
    echo "trainer is not installed here; run scripts/launch/tpu install first." >&2
    exit 1
fi
cd trainer
rm -f train.status # an earlier training's: if this one is refused, keep must not read it
tpu=$(find_servers)

go_on() {
    if [[ $tpu != local ]]; then export TPU_LOAD_LIBRARY=0; fi # the servers have the TPU
    start train .venv-tpu/bin/trainer train "$@"
    echo "Training goes on without this connection. scripts/launch/tpu log follows it, scripts/launch/tpu stop ends it."
}
END
}

train_text() {
    begin_text
    cat <<'END'
how=()
if [[ $1 == --or-resume ]]; then
    how=(--or-resume)
    shift
fi
# The hosts of a slice share no disk.
if [[ $tpu != local ]]; then
    folders=$(.venv-tpu/bin/python -c '
import sys
from trainer.config.file import load_config
config = load_config(sys.argv[1], sys.argv[2:])
print(config.run_folder, "and", config.data.prepared_folder)' "$@")
    if [[ $folders != gs://*' and gs://'* ]]; then
        echo "On a slice run_folder and data.prepared_folder have to be on gs://; they are $folders." >&2
        exit 1
    fi
fi
go_on ${how[@]+"${how[@]}"} "$1" distribution.kind=tpu "distribution.tpu_name=$tpu" "${@:2}"
END
}

# Prints absent, training, "ended STATUS" or idle.
state_text() {
    functions_text
    cat <<'END'
if [[ ! -x trainer/.venv-tpu/bin/trainer ]]; then
    echo absent
elif is_training; then
    echo training
elif [[ -e trainer/train.status ]]; then
    echo "ended $(<trainer/train.status)"
else
    echo idle
fi
END
}

resume_text() {
    begin_text
    cat <<'END'
if [[ $tpu != local && $1 != gs://* ]]; then
    echo "On a slice the run has to be on gs://; it is $1." >&2
    exit 1
fi
go_on --resume "$1" distribution.kind=tpu "distribution.tpu_name=$tpu" "${@:2}"
END
}

log_text() {
    cat <<'END'
set -e
cd trainer
tail -n 100 -f --pid="$(cat train.pid)" train.log
END
}

stop_text() {
    cat <<'END'
cd trainer || exit
if ! pkill -TERM -F train.pid -f 'bin/trainer train' 2>/dev/null; then
    echo "Nothing is training here." >&2
    exit 1
fi
tail -n 5 -f --pid="$(cat train.pid)" train.log
echo "The trainer has ended."
END
}
