#!/usr/bin/env bash
# A host of a job: `host.sh run` installs the shipped code and trains; start, status and stop do so in the background, for
# hosts that are only reached by ssh; install and record are for Slurm. It stands in the folder that was shipped, beside
# job.env, whose values are quoted.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
. ./job.env # PYTHON WHEEL BUILD RUN AGAIN WORDS
venv="venv-$BUILD"

install() {
    [ -e "$venv/ready" ] && return 0
    rm -rf "$venv"
    if ! "python$PYTHON" -m venv "$venv" 2>/dev/null; then # Ubuntu's own Python may be another, or lack venv
        rm -rf "$venv"
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python "$PYTHON" "$venv" || return 1
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        "./$WHEEL[tpu,data]" || return 1
    touch "$venv/ready"
}

case "$1" in
run)
    trap 'exit 75' TERM # a container's first process hears only signals that it handles; nothing has to be saved yet
    install || { echo "podwright: $(hostname): the shipped code could not be installed" >&2; exit 69; }
    export PODWRIGHT_COMMAND="$AGAIN"
    exec "$venv/bin/python" -m launch train ./config.json --run "$RUN" "${WORDS[@]}"
    ;;
install)
    install
    ;;
record) # runs, and keeps the exit code in a file: srun tells the largest of all only
    trap : TERM # which reaches this shell, too
    bash ./host.sh run
    code=$?
    echo $code >"$2"
    exit $code
    ;;
supervise) # holds the lock as long as the host works for the job
    exec 9>lock
    flock --timeout 10 9 || exit 0 # whoever only looks holds it for a moment, too
    rm -f code
    bash ./host.sh run >>log 2>&1 9>&- &
    echo $! >pid
    wait $!
    echo $? >code.partial && mv code.partial code
    ;;
start)
    if flock --timeout 2 lock true; then # who just ended may still hold it
        rm -f code
        setsid bash ./host.sh supervise </dev/null >/dev/null 2>&1 &
        for _ in $(seq 100); do
            { ! flock --nonblock lock true || [ -e code ]; } && break
            sleep 0.1
        done
    fi
    ;;
status)
    held=no # asked first: who has let go has written its code
    [ -e lock ] && ! flock --nonblock lock true && held=yes
    if [ -e code ]; then
        echo "podwright-host ended $(cat code)"
    elif [ $held = yes ]; then
        echo "podwright-host running"
    else
        echo "podwright-host absent"
    fi
    ;;
stop | kill)
    signal=TERM
    [ "$1" = kill ] && signal=KILL
    [ -e pid ] && [ ! -e code ] && kill -s "$signal" "$(cat pid)" 2>/dev/null
    true
    ;;
esac
