#!/usr/bin/env bash
# The part of launch_tpu.sh that runs on each worker of a slice:
#   worker.sh setup | credentials | start MODULE WORKDIR ARGUMENT... | state | follow | stop | job
# Each may be repeated: a connection that breaks is tried again. Exit code 10: another attempt will not help.
#
# ~/hbpo_jax/src/COMMIT    the code, with its environment in .venv and .ready when both are whole
# ~/hbpo_jax/current       the commit that was set up last
# ~/hbpo_jax/job           command, log, pid, run_pid, and exit_code when it ended: a number, or 'stopped' where the
#                          run was asked to stop before its end and the same command goes on; halt: by `stop`
# ~/hbpo_jax/gcs/BUCKET    a mounted bucket
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
BASE=$HOME/hbpo_jax
JOB=$BASE/job
UV_VERSION=0.13.9
export PATH=$HOME/.local/bin:$PATH

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 10
}

# A socket of its own, so that nobody's tmux configuration or session is in the way.
mux() { tmux -L hbpo -f /dev/null "$@"; }

# At its first boot a machine installs updates, which lock apt for minutes.
install_packages() {
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$@"
}

setup() {
  command -v tmux >/dev/null || install_packages tmux
  command -v uv >/dev/null || curl -LsSf --retry 5 "https://astral.sh/uv/$UV_VERSION/install.sh" | sh
  cd "$HERE"
  if [[ -f uv.lock ]]; then
    uv sync --quiet --locked --python=3.12 --extra=tpu --extra=wandb --extra=gin
  else
    # Packages as of the commit's date, so that all workers, and a slice created later, get the same.
    uv venv --quiet --clear --python=3.12
    uv pip install --quiet --exclude-newer="$(git log -1 --format=%cI)" --editable='.[tpu,wandb,gin]'
  fi
  .venv/bin/python -c 'import hbpo_jax, jax, libtpu' || fail "the environment of $HERE is not whole; see above."
  ln -sfn "$HERE" "$BASE/current"
  touch .ready
}

# Takes lines of `export NAME=value` from stdin; the last says that none is missing.
credentials() {
  umask 077
  mkdir -p "$BASE"
  cat >"$BASE/.credentials.new"
  [[ $(tail -n 1 "$BASE/.credentials.new") = '# end' ]] || exit 1
  mv -f "$BASE/.credentials.new" "$BASE/.credentials"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fsS --retry 5 "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_packages gcsfuse
}

# Prints the directory that stands for a working directory, with its bucket mounted if it is in one.
open_workdir() {
  local path=${1#gs://} bucket mount
  if [[ $1 != gs://* ]]; then
    mkdir -p "$HOME/$1"
    echo "$HOME/$1"
    return
  fi
  bucket=${path%%/*}
  mount=$BASE/gcs/$bucket
  mkdir -p "$mount"
  command -v gcsfuse >/dev/null || install_gcsfuse >&2
  # Nothing cached, for the workers see each other's files; no streaming, with which fsync would not reach the bucket;
  # and a checkpoint is put in place by renaming its directory.
  mountpoint -q "$mount" || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --enable-streaming-writes=false --rename-dir-limit=1000000 "$bucket" "$mount" >&2 ||
    fail "$bucket cannot be mounted; the VM's service account needs roles/storage.objectUser on it."
  mkdir -p "$mount/${path#*/}"
  echo "$mount/${path#*/}"
}

state() {
  local word='none -'
  if [[ -f $JOB/exit_code ]]; then
    word="exited $(cat "$JOB/exit_code")"
    [[ $word != 'exited stopped' ]] || word='stopped -'
  elif mux has-session -t '=job' 2>/dev/null; then
    word='running -'
  elif [[ -d $JOB ]]; then
    word='gone -'  # ended without a word: the machine did
  fi
  printf 'hbpo-state %s %s\n' "$word" "$(hostname)"
}

start() {
  local workdir command
  workdir=$(open_workdir "$2")
  printf -v command '%q ' "$1" "$workdir" "${@:3}"
  if [[ $(state) = 'hbpo-state running '* ]]; then
    [[ $command = "$(cat "$JOB/command")" && $HERE = "$(cat "$JOB/code")" ]] ||
      fail "another job is running; wait for it, or: ./launch_tpu.sh stop"
    echo "$(hostname): the job is running already"
    return
  fi
  rm -rf "$JOB"
  mkdir -p "$JOB"
  printf '%s' "$command" >"$JOB/command"
  printf '%s' "$HERE" >"$JOB/code"
  # tmux, which outlives the connection, and unlike a service of systemd keeps the session's limit of locked memory.
  mux new-session -d -s job "bash $(printf %q "$HERE/tpu/worker.sh") job"
}

# Brings to the bucket what the job has written but not closed. An open log would reach it when the job ends, or never.
preserve() {
  local logs=$1/logs
  [[ $1 = "$BASE"/gcs/* ]] || return 0
  mkdir -p "$logs"
  cp "$JOB/log" "$logs/$2"
  find "$1" -maxdepth 5 \( -name checkpoints -o -name best -o -name export -o -name logs \) -prune -o \
    \( -name '*.jsonl' -o -name 'events.*' \) -exec sync {} +
}

# Runs the command; only tmux calls this.
job() {
  local code=0 keeper log_name run=''
  # A machine that shuts down tells every process, and tmux its windows. The run saves its state then, and must not lose
  # the shell that says how it ended.
  trap '' HUP
  trap '[[ -z $run ]] || kill -TERM "$run" 2>/dev/null || true' TERM
  eval "set -- $(cat "$JOB/command")"
  log_name=$(date -u +%Y%m%dT%H%M%SZ).$(hostname).log
  cd "$HERE"
  echo $$ >"$JOB/pid"
  : >"$JOB/log"
  if [[ -f $BASE/.credentials ]]; then
    # shellcheck disable=SC1091
    source "$BASE/.credentials"
    rm -f "$BASE/.credentials"
  fi
  while sleep 60; do preserve "$2" "$log_name" || true; done &
  keeper=$!
  .venv/bin/python -u -m "hbpo_jax.$1" --workdir="$2" "${@:3}" >>"$JOB/log" 2>&1 </dev/null &
  run=$!
  echo "$run" >"$JOB/run_pid"
  while true; do  # A signal ends the wait, not the run.
    code=0
    wait "$run" || code=$?
    kill -0 "$run" 2>/dev/null || break
  done
  kill "$keeper" || true
  preserve "$2" "$log_name" || true
  # It ends with 0 also where it stopped early, as it was asked to.
  ((code)) || [[ ! -f $2/stopped.json ]] || code=stopped
  [[ ! -f $JOB/halt ]] || code=130
  echo "$code" >"$JOB/exit_code.new"
  mv "$JOB/exit_code.new" "$JOB/exit_code"
}

follow() {
  [[ -d $JOB ]] || fail "no job was started here."
  touch "$JOB/log"
  if [[ $(state) = 'hbpo-state running '* ]]; then
    tail -n 200 -F --pid="$(cat "$JOB/pid")" "$JOB/log"
  else
    tail -n 200 "$JOB/log"
  fi
  state >&2
}

# Ends the job: it may save its state first; what is still there after a minute is stuck.
stop() {
  local pid tries
  [[ -d $JOB && ! -f $JOB/exit_code ]] || return 0
  touch "$JOB/halt"
  pid=$(cat "$JOB/pid" 2>/dev/null || true)
  if [[ -n $pid ]] && kill -TERM "$pid" 2>/dev/null; then
    for ((tries = 0; tries < 300; tries++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL "$pid" "$(cat "$JOB/run_pid" 2>/dev/null || echo "$pid")" 2>/dev/null || true
  fi
  mux kill-session -t '=job' 2>/dev/null || true
  echo 130 >"$JOB/exit_code"
}

"$@"
