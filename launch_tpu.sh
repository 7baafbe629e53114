#!/usr/bin/env bash
# Creates, sets up, runs, follows, fetches and deletes a run on a Cloud TPU VM or pod slice: ./launch_tpu.sh help
#
# Runs on a laptop with gcloud and git, also under bash 3.2 of macOS: no associative arrays, and an array that may be
# empty is written ${A[@]+"${A[@]}"}. Its other rooms: tpu/vm.sh (gcloud), tpu/job.sh (the
# job, from here), tpu/worker.sh (the job, on a worker).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu/vm.sh
source "$ROOT/tpu/vm.sh"
# shellcheck source=tpu/job.sh
source "$ROOT/tpu/job.sh"

usage() {
  cat <<'TEXT'
Train on a Cloud TPU VM or pod slice with gcloud, from a laptop.

usage: ./launch_tpu.sh COMMAND [flags] [-- arguments of the training command]

  ./launch_tpu.sh run --name=r1 --zone=us-east5-b --type=v6e-8 --spot --bucket=gs://my-bucket -- \
    --config=r1_distill_qwen_1p5b

commands
  up       create the TPU VM, or take the one that is there, and set up every worker
  run      up, then start the job on every worker; it goes on when the connection ends
  logs     follow a worker's log
  status   state of VM, queue and job, and the newest metrics
  fetch    copy the working directory here
  stop     end the job; the VM stays
  down     delete the VM and its queued resource; what lies in the bucket stays
  local    run the job on this machine (CPU, GPU or TPU VM)
  help     this text

flags; each has a default in the environment, --type in HBPO_TPU_TYPE
  --name=hbpo            of the VM, its queued resource and, by default, the working directory
  --zone=ZONE --project=ID       default: gcloud's own
  --type=v5litepod-8     accelerator type: v5litepod-N, v6e-N (chips), v5p-N, v4-N (cores)
  --version=IMAGE        runtime image; default by type
  --topology=v5e:2x4     what `hbpo_jax.plan` plans for; default by type
  --spot                 a spot VM; `run` then watches
  --queued               wait in the queue of capacity, as a queued resource
  --wait_s=21600         longest wait for a VM, seconds
  --network=NAME --subnetwork=NAME --service_account=EMAIL
  --bucket=gs://NAME     the working directory is gs://NAME/<name>
  --workdir=gs://NAME/DIR        or name it; without either it lies on the VM and goes with it (one worker only)
  --command=train        or sft, evaluate
  --no_plan              start without asking `hbpo_jax.plan` whether the run fits
  --allow_dirty          launch HEAD although the working tree has changes, which stay behind
  --watch                run: wait for the end of the job and pass its exit code on; where the slice is preempted,
                         or the machine restarts, create it again and resume
  --max_restarts=20      how often
  --poll_s=60            seconds between two looks while waiting
  --worker=0             logs: whose
  --to=DIR               fetch: where to; default runs/<name>
  --skip_checkpoints     fetch: without checkpoints/, best/ and export/
  --yes                  down: do not ask
  --dry_run              print every command, run none

WANDB_API_KEY and HF_TOKEN of the environment reach the job: through stdin into a file on the workers that only you can
read and that the job deletes when it has read it. They are never printed, stored here, or part of a command line.
TEXT
}

cmd_up() {
  check_tree
  ensure_vm
  set_up
  say "$NAME is ready"
}

cmd_run() {
  local code=0
  ((${#ARGS[@]})) || refuse "run needs the arguments of the training command: run ... -- --config=NAME"
  check_workdir
  check_tree
  show_plan
  ensure_vm
  set_up
  start_job
  if ((WATCH && !DRY_RUN)); then
    say "watching; Ctrl-C ends the watch, not the job"
    trap 'say "no longer watching; the job goes on, and the same command watches again"; exit 130' INT TERM
    watch_job || code=$?
    exit "$code"
  fi
  say "follow it: ./launch_tpu.sh logs --name=$NAME${ZONE:+ --zone=$ZONE}"
}

cmd_logs() { retry on_worker "$WORKER" "$(remote follow)"; }

cmd_status() {
  read_vm
  read_queue
  echo "vm: ${VM_STATE:-none}${VM_TYPE:+ ($VM_TYPE, $VM_WORKERS workers)}"
  [[ -z $QUEUE_STATE ]] || echo "queue: $QUEUE_STATE $QUEUE_ERROR"
  [[ $VM_STATE != READY ]] || retry on_worker all "$(remote state)" ||
    say "the workers do not answer, or are not set up"
  if [[ $WORKDIR = gs://* ]]; then
    # The file grows with the run; its end is enough.
    { act gcloud --quiet storage cat --range=-20000 "$WORKDIR/metrics.jsonl" </dev/null | tail -n 1; } ||
      say "no metrics in $WORKDIR"
  elif [[ $VM_STATE = READY ]]; then
    on_worker 0 "tail -n 1 $(quoted "${WORKDIR:-hbpo_jax/runs/$NAME}/metrics.jsonl")" || say "no metrics yet"
  fi
}

cmd_fetch() {
  local flags=(--recursive) to=${TO:-runs/$NAME}
  ((!SKIP_CHECKPOINTS)) || flags+=(--exclude='^(.*/)?(checkpoints|best|export)/.*')
  act mkdir -p "$to"
  if [[ $WORKDIR = gs://* ]]; then
    retry act gcloud --quiet storage rsync "${flags[@]}" "$WORKDIR" "$to" ||
      die "$WORKDIR could not be copied; see above."
  else
    ((!SKIP_CHECKPOINTS)) || refuse "--skip_checkpoints serves a working directory in a bucket only; leave it out."
    retry tpus tpu-vm scp --recurse --worker=0 "$NAME:${WORKDIR:-hbpo_jax/runs/$NAME}/*" "$to" ||
      die "the working directory could not be copied; its message is above."
  fi
  say "fetched to $to; to read it: python -m hbpo_jax.report $to --out=report"
}

cmd_stop() { retry on_worker all "$(remote stop)"; }

cmd_down() {
  local answer=''
  if ((!YES && !DRY_RUN)); then
    read -r -p "Delete the TPU VM $NAME and its queued resource? [y/N] " answer || true
    [[ $answer = [yY]* ]] || die "nothing was deleted."
  fi
  delete
  ((DRY_RUN)) || say "$NAME is deleted"
}

cmd_local() {
  local extra='' python=$ROOT/.venv/bin/python
  ((${#ARGS[@]})) || refuse "local needs the arguments of the training command: local -- --config=smoke"
  [[ -n $WORKDIR ]] || WORKDIR=runs/$NAME
  [[ $WORKDIR != gs://* ]] ||
    refuse "--workdir=$WORKDIR is a bucket, but local writes to a directory; leave out --bucket, or mount it."
  act make --no-print-directory -C "$ROOT" .venv/.runtime
  if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    extra=tpu
  elif command -v nvidia-smi >/dev/null; then
    extra=cuda
  fi
  [[ -z $extra ]] || act "$python" -m pip install --quiet --disable-pip-version-check --editable "${ROOT}[$extra]"
  act "$python" -m "hbpo_jax.$COMMAND" --workdir="$WORKDIR" "${ARGS[@]}"
}

VALUES="NAME ZONE PROJECT TYPE VERSION TOPOLOGY WAIT_S NETWORK SUBNETWORK SERVICE_ACCOUNT BUCKET WORKDIR COMMAND
MAX_RESTARTS POLL_S WORKER TO"
SWITCHES="SPOT QUEUED NO_PLAN ALLOW_DIRTY WATCH SKIP_CHECKPOINTS YES DRY_RUN"

# Each flag in a variable of its name: from the environment, or empty; a switch is 0 or 1.
read_environment() {
  local flag from
  for flag in $VALUES; do
    from=HBPO_TPU_$flag
    printf -v "$flag" '%s' "${!from:-}"
  done
  for flag in $SWITCHES; do
    from=HBPO_TPU_$flag
    case ${!from:-0} in 0 | false) printf -v "$flag" 0 ;; *) printf -v "$flag" 1 ;; esac
  done
}

read_flags() {
  local flag value
  while (($#)); do
    case $1 in
      --) ARGS=("${@:2}"); return ;;
      -h | --help) usage; exit 0 ;;
      --[a-z]*) ;;
      *) refuse "argument $1 is not understood; what the training command is to read goes after --." ;;
    esac
    value=${1#*=} flag=${1%%=*}
    flag=$(printf '%s' "${flag#--}" | tr '[:lower:]' '[:upper:]')
    if [[ " $SWITCHES " = *" $flag "* ]]; then
      [[ $1 != *=* ]] || refuse "$1 is a switch; write ${1%%=*}."
      value=1
    elif [[ " ${VALUES//$'\n'/ } " = *" $flag "* ]]; then
      if [[ $1 != *=* ]]; then
        (($# > 1)) || refuse "$1 has no value; write $1=value."
        value=$2
        shift
      fi
    else
      refuse "${1%%=*} is not a flag of launch_tpu.sh (help lists them); the training command's go after --."
    fi
    printf -v "$flag" '%s' "$value"
    shift
  done
}

# Defaults, and what can be refused before anything is asked of the network.
settle() {
  local flag
  NAME=${NAME:-hbpo} TYPE=${TYPE:-v5litepod-8} COMMAND=${COMMAND:-train} WORKER=${WORKER:-0}
  MAX_RESTARTS=${MAX_RESTARTS:-20} POLL_S=${POLL_S:-60} WAIT_S=${WAIT_S:-21600} BACKOFF_S=${HBPO_TPU_BACKOFF_S:-5}
  VERSION=${VERSION:-$(version_of "$TYPE")} TOPOLOGY=${TOPOLOGY:-$(topology_of "$TYPE")}
  ((!SPOT)) || WATCH=1
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "--name=$NAME does not name a VM; take small letters, digits and hyphens, a letter first."
  [[ $TYPE =~ ^v[0-9a-z]+-[0-9]+$ ]] || refuse "--type=$TYPE is not an accelerator type; v5litepod-8 and v6e-8 are."
  for flag in MAX_RESTARTS POLL_S WAIT_S WORKER; do
    [[ ${!flag} =~ ^[0-9]+$ ]] ||
      refuse "--$(printf '%s' "$flag" | tr '[:upper:]' '[:lower:]')=${!flag} is not a whole number."
  done
  case $COMMAND in train | sft | evaluate) ;; *) refuse "--command=$COMMAND is not one of train, sft, evaluate." ;; esac
  [[ -z $BUCKET || $BUCKET = gs://* ]] || BUCKET=gs://$BUCKET
  [[ -z $BUCKET || -n $WORKDIR ]] || WORKDIR=${BUCKET%/}/$NAME
  WORKDIR=${WORKDIR%/}
  [[ $WORKDIR != gs://* || $WORKDIR = gs://?*/?* ]] ||
    refuse "--workdir=$WORKDIR is a whole bucket; name a folder in it."
  for flag in ${ARGS[@]+"${ARGS[@]}"}; do
    [[ $flag != --workdir* ]] || refuse "$flag belongs before the --, so that the workers and fetch know it too."
  done
  PLACE=()
  [[ -z $ZONE ]] || PLACE+=(--zone="$ZONE")
  [[ -z $PROJECT ]] || PLACE+=(--project="$PROJECT")
}

main() {
  local command=${1:-help}
  ARGS=() DRY_STATE=''
  case $command in
    help | -h | --help) usage; exit 0 ;;
    up | run) ;;
    logs | status | fetch | stop | down | local) DRY_STATE=READY ;;
    *) refuse "$command is not a command; choose one of up, run, logs, status, fetch, stop, down, local, help." ;;
  esac
  read_environment
  read_flags "${@:2}"
  settle
  [[ $command = local || $DRY_RUN = 1 ]] || command -v gcloud >/dev/null ||
    die "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  exec 3>&1
  TMP=$(mktemp -d "${TMPDIR:-/tmp}/launch_tpu.XXXXXX")
  trap 'rm -rf "$TMP"' EXIT
  "cmd_$command"
}

main "$@"
