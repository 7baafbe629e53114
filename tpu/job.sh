# shellcheck shell=bash
# The part of launch_tpu.sh that brings code to the workers, and starts and watches the job there.

CREDENTIALS="WANDB_API_KEY HF_TOKEN"  # passed on from the caller's environment, through stdin only

check_tree() {
  SHA=$(git -C "$ROOT" rev-parse HEAD) ||
    die "$ROOT is no git checkout; launch from a clone, whose commit the run records."
  [[ -n $(git -C "$ROOT" status --porcelain) ]] || return 0
  ((ALLOW_DIRTY)) ||
    die "the working tree has changes, which the run would lack; commit them, or leave them behind: --allow_dirty."
  say "warning: changes in the working tree stay behind; the run has commit ${SHA:0:12}"
}

# Brings this commit and its environment to every worker that has not got them.
set_up() {
  local text src=hbpo_jax/src/$SHA archive=hbpo_jax-$SHA.tgz
  local stamp=$src/.ready
  text=$(retry on_worker all "test -e $stamp && ln -sfn src/$SHA hbpo_jax/current || echo hbpo-missing") ||
    die "no connection to $NAME; try: gcloud compute tpus tpu-vm ssh $NAME"
  [[ $text = *hbpo-missing* || $DRY_RUN = 1 ]] || return 0
  say "setting up $NAME: commit ${SHA:0:12}"
  pack "$TMP/$archive"
  retry tpus tpu-vm scp "$TMP/$archive" "$NAME:$archive" --worker=all ||
    die "the code could not be copied to $NAME; see above."
  retry on_worker all \
    "test -e $stamp || { mkdir -p $src && tar -xzf $archive -C $src && bash $src/tpu/worker.sh setup; }" ||
    die "the set-up of $NAME failed; the worker's message is above."
}

# Writes HEAD to an archive. As a clone, so that run.json names the commit; of depth 1, so that it is small.
pack() {
  [[ ! -e $1 ]] || return 0  # a restart sends the same
  export COPYFILE_DISABLE=1  # or macOS's tar adds files of its own
  act git -c advice.detachedHead=false clone --quiet --depth=1 "file://$ROOT" "$TMP/src" &&
    act tar -C "$TMP/src" -czf "$1" . || die "the commit ${SHA:0:12} could not be packed; see above."
}

topology_of() {
  local n=${1##*-} shape=''
  case $1 in
    v5litepod-* | v6e-*)
      case $n in
        1) shape=1x1 ;; 4) shape=2x2 ;; 8) shape=2x4 ;; 16) shape=4x4 ;; 32) shape=4x8 ;;
        64) shape=8x8 ;; 128) shape=8x16 ;; 256) shape=16x16 ;;
      esac ;;
    v5p-* | v4-*)  # counted in cores, two to a chip
      case $n in
        8) shape=2x2x1 ;; 16) shape=2x2x2 ;; 32) shape=2x2x4 ;; 64) shape=2x4x4 ;; 128) shape=4x4x4 ;;
        256) shape=4x4x8 ;; 512) shape=4x8x8 ;; 1024) shape=8x8x8 ;;
      esac ;;
  esac
  [[ -z $shape ]] || case $1 in
    v5litepod-*) echo "v5e:$shape" ;;
    *) echo "${1%-*}:$shape" ;;
  esac
}

version_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Whether the run fits and what it costs, before anything is paid for.
show_plan() {
  local code=0 python=$ROOT/.venv/bin/python
  local has='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("libtpu", "hbpo_jax"))))'
  ((!NO_PLAN)) || return 0
  [[ $COMMAND = train ]] || { say "plan: skipped, for it plans training only"; return 0; }
  [[ -n $TOPOLOGY ]] || { say "plan: skipped, for no topology is known for --type=$TYPE; give --topology"; return 0; }
  [[ -x $python ]] || python=python3
  if ((!DRY_RUN)) && ! "$python" -c "$has" 2>/dev/null; then
    say "plan: skipped, for libtpu is not installed here; make setup, then .venv/bin/python -m pip install -e '.[tpu]'"
    return 0
  fi
  act "$python" -m hbpo_jax.plan --topology="$TOPOLOGY" --workdir="$TMP/plan" ${ARGS[@]+"${ARGS[@]}"} || code=$?
  case $code in
    0) ;;
    1) die "the run does not fit $TOPOLOGY; change what the plan advises, or start it all the same with --no_plan." ;;
    *) die "the run could not be planned (exit code $code); mend the settings, or leave the plan out with --no_plan." ;;
  esac
}

check_workdir() {
  [[ -n $WORKDIR ]] || WORKDIR=hbpo_jax/runs/$NAME
  [[ $WORKDIR != gs://* ]] || return 0
  ((!SPOT)) || refuse "a spot VM takes a working directory on its disk with it; give --bucket=gs://NAME."
  say "warning: $WORKDIR lies on the VM and goes with it; --bucket=gs://NAME keeps it"
}

credential_lines() {
  { set +x; } 2>/dev/null  # not even under bash -x
  local name
  for name in $CREDENTIALS; do
    [[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
  done
  echo '# end'
}

# One worker at a time: with --worker=all, gcloud's connections would share one stdin.
send_credentials() {
  local call=(tpu-vm ssh "$NAME" --worker="$1" --command="$(remote credentials)")
  if ((DRY_RUN)); then tpus "${call[@]}"; else credential_lines | tpus_stdin "${call[@]}"; fi
}

start_job() {
  local worker
  [[ $WORKDIR = gs://* || $VM_WORKERS = 1 ]] ||
    die "$NAME has $VM_WORKERS workers, which must share a working directory; give --bucket=gs://NAME."
  if (($(credential_lines | wc -l) > 1)); then
    for ((worker = 0; worker < VM_WORKERS; worker++)); do
      retry send_credentials "$worker" || die "the credentials did not reach worker $worker; see above."
    done
  fi
  retry on_worker all "$(remote start "$COMMAND" "$WORKDIR" ${ARGS[@]+"${ARGS[@]}"})" ||
    die "the job did not start on every worker; the message is above."
  say "started on $VM_WORKERS worker(s), writing to $WORKDIR"
}

# Sets JOB to running, gone (killed with its machine, or stopped when that was announced), unreachable, or the exit code.
read_job() {
  local text mark state code n=0 done=0
  JOB=unreachable
  text=$(on_worker all "$(remote state)" 2>"$TMP/stderr") || return 0
  JOB=running
  while read -r mark state code _; do
    [[ $mark = hbpo-state ]] || continue
    n=$((n + 1))
    case $state:$code in
      exited:0) done=$((done + 1)) ;;
      exited:129 | exited:143) JOB=gone ;;  # hung up or terminated: a shutdown
      exited:*) [[ $JOB = gone ]] || { JOB=$code; return 0; } ;;
      gone:* | stopped:*) JOB=gone ;;
    esac
  done <<<"$text"
  if ((n > 0 && done == n)); then JOB=0; fi
}

# Waits for the end of the job and returns its exit code; recreates the slice and resumes when it is taken away.
watch_job() {
  local restarts=0 misses=0 doubt='' said=''
  while true; do
    sleep "$POLL_S"
    read_vm
    if [[ $VM_STATE = READY ]]; then read_job; else JOB=${VM_STATE:-missing}; fi
    [[ $JOB = "$said" ]] || say "$(date '+%H:%M:%S') job: $JOB"
    said=$JOB
    case $JOB in
      0) return 0 ;;
      running | CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING) misses=0 doubt='' ;;
      unreachable)
        misses=$((misses + 1))
        ((misses < 10)) || die "$NAME is READY but did not answer $misses times; try ./launch_tpu.sh status." ;;
      *)
        # A host that is shut down, or loses its neighbours, fails before the slice is called preempted: look twice.
        if [[ $VM_STATE = READY && $doubt != "$JOB" ]]; then
          doubt=$JOB
          continue
        fi
        # Other hosts may still wait for the one that ended.
        [[ $VM_STATE != READY ]] || on_worker all "$(remote stop)" >/dev/null 2>&1 || true
        if [[ $JOB =~ ^[0-9]+$ ]]; then
          say "the job ended with exit code $JOB; see ./launch_tpu.sh logs --name=$NAME"
          return "$JOB"
        fi
        ((restarts < MAX_RESTARTS)) ||
          die "the slice was taken away again after --max_restarts=$MAX_RESTARTS; the same command goes on from there."
        restarts=$((restarts + 1)) misses=0 doubt='' said=''
        say "restart $restarts of at most $MAX_RESTARTS"
        # In a subshell, for it may be taken away meanwhile: the next look finds out.
        (ensure_vm 1 && set_up && start_job) || say "the restart failed" ;;
    esac
  done
}
