# shellcheck shell=bash
# The part of launch_tpu.sh that speaks to gcloud: one call, tried again; the TPU VM and its queued resource.

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

refuse() {
  say "error: $*"
  exit 2
}

# The arguments as one line that any shell splits into them again.
quoted() {
  local word space='' quote="'" escape="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]]; then
      printf '%s%s' "$space" "$word"
    else
      printf "%s'%s'" "$space" "${word//$quote/$escape}"
    fi
    space=' '
  done
}

# Runs a command, or prints it under --dry_run; on descriptor 3, for the caller may be reading stdout.
act() {
  if ((DRY_RUN)); then
    quoted "$@" >&3
    printf '\n' >&3
  else
    "$@"
  fi
}

TRIES=4  # of one gcloud call over the network

# Runs a command up to TRIES times, with pauses that double. gcloud's exit code is 255 where ssh fails, 1 for most else;
# 2 is a wrong argument, 10 a failure on the worker that it knows to be lasting, 126 and 127 a missing program.
retry() {
  local attempt code pause=$BACKOFF_S
  for ((attempt = 1; ; attempt++)); do
    code=0
    "$@" || code=$?
    case $code in 0 | 2 | 10 | 126 | 127) return "$code" ;; esac
    ((attempt < TRIES)) || return "$code"
    say "attempt $attempt of $TRIES failed (exit code $code); again in $pause s"
    sleep "$pause"
    pause=$((pause * 2))
  done
}

# `gcloud compute tpus ...` with the project and the zone; stdin is the caller's.
tpus_stdin() { act gcloud --quiet compute tpus "$@" ${PLACE[@]+"${PLACE[@]}"}; }

# The same without stdin: ssh would eat the terminal's.
tpus() { tpus_stdin "$@" </dev/null; }

on_worker() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

# One line of shell that runs tpu/worker.sh with these arguments on a worker.
remote() { printf 'bash hbpo_jax/current/tpu/worker.sh %s' "$(quoted "$@")"; }

# Output of a `describe`, or nothing where the thing does not exist. Another error must not look like absence: a VM that
# is thought missing is created again.
describe() {
  tpus "$@" 2>"$TMP/stderr" && return 0
  grep -qiE 'NOT_FOUND|was not found|code=404' "$TMP/stderr" && return 0
  cat "$TMP/stderr" >&2
  return 1
}

# Sets VM_STATE ('' without a VM), VM_TYPE, VM_WORKERS.
read_vm() {
  local text
  text=$(retry describe tpu-vm describe "$NAME" \
    --format="value[separator=','](state,acceleratorType.basename(),networkEndpoints.len())") ||
    die "gcloud cannot describe the TPU VM $NAME; its message is above."
  ((!DRY_RUN)) || text=${DRY_STATE:+$DRY_STATE,$TYPE,1}
  IFS=, read -r VM_STATE VM_TYPE VM_WORKERS <<<"$text"
}

# Sets QUEUE_STATE ('' without a queued resource), QUEUE_ERROR.
read_queue() {
  local text
  text=$(retry describe queued-resources describe "$NAME" \
    --format="value[separator=','](state.state,state.failedData.error.message)") ||
    die "gcloud cannot describe the queued resource $NAME; its message is above."
  IFS=, read -r QUEUE_STATE QUEUE_ERROR <<<"$text"
}

# What to do about a creation that failed with this message.
remedy() {
  case $1 in
    *[Qq]uota*)
      echo "The project's quota is too small: ask for more (IAM > Quotas, TPU API), or change --type or --zone." ;;
    *"no more capacity"* | *stockout* | *STOCKOUT* | *RESOURCE_EXHAUSTED*)
      echo "The zone has no free chips: add --queued to wait for them, or change --zone or --type." ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      echo "Enable the API: gcloud services enable tpu.googleapis.com" ;;
    *PERMISSION_DENIED* | *ermission*)
      echo "Your account needs roles/tpu.admin and, for --service_account, roles/iam.serviceAccountUser." ;;
    *"active account"* | *"auth login"*) echo "Log in: gcloud auth login" ;;
    *) echo "Check --type=$TYPE, --version=$VERSION and --zone=${ZONE:-(none given)}: not every zone has every type." ;;
  esac
}

# Creates the VM or its queued resource. Returns 75 where the zone has no capacity, which a watch waits out.
create() {
  local text flags=(--accelerator-type="$TYPE")
  ((!SPOT)) || flags+=(--spot)
  [[ -z $NETWORK ]] || flags+=(--network="$NETWORK")
  [[ -z $SUBNETWORK ]] || flags+=(--subnetwork="$SUBNETWORK")
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  DRY_STATE=READY
  say "creating $NAME: $TYPE with $VERSION"
  if ((QUEUED)); then
    tpus queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$VERSION" "${flags[@]}" \
      2>"$TMP/stderr" && return 0
  else
    tpus tpu-vm create "$NAME" --version="$VERSION" "${flags[@]}" 2>"$TMP/stderr" && return 0
  fi
  text=$(cat "$TMP/stderr")
  say "$text"
  text=$(remedy "$text")
  [[ $text != "The zone has no free chips"* ]] || return 75
  die "$NAME could not be created. $text"
}

delete_queue() {
  retry tpus queued-resources delete "$NAME" --force || die "the queued resource $NAME could not be deleted; see above."
}

# Deletes the queued resource with its VM, or the VM alone.
delete() {
  read_queue
  if [[ -n $QUEUE_STATE || ($DRY_RUN = 1 && $QUEUED = 1) ]]; then
    delete_queue
  fi
  read_vm
  case $VM_STATE in
    '' | DELETING) ;;
    *) retry tpus tpu-vm delete "$NAME" || die "the TPU VM $NAME could not be deleted; its message is above." ;;
  esac
}

# One step towards a queued resource that has its VM.
advance_queue() {
  read_queue
  [[ $QUEUE_STATE = "${QUEUE_SEEN:-}" ]] || say "queued resource $NAME: ${QUEUE_STATE:-none}"
  QUEUE_SEEN=$QUEUE_STATE
  case $QUEUE_STATE in
    '') create || die "$NAME could not be queued. $(remedy "$(cat "$TMP/stderr")")" ;;
    FAILED)
      say "the queued resource $NAME failed: ${QUEUE_ERROR:-no reason given}"
      die "$(remedy "$QUEUE_ERROR") Delete it (./launch_tpu.sh down --name=$NAME) before the next attempt." ;;
    SUSPENDED) delete_queue ;;
    *) sleep "$POLL_S" ;;
  esac
}

# Creates the VM unless it is there, replaces one that was preempted, and waits until it is READY.
ensure_vm() {
  local patient=${1:-0} deadline=$((SECONDS + WAIT_S)) seen=''
  while true; do
    read_vm
    [[ $VM_STATE = "$seen" ]] || say "TPU VM $NAME: ${VM_STATE:-none}"
    seen=$VM_STATE
    case $VM_STATE in
      READY)
        [[ $VM_TYPE = "$TYPE" ]] ||
          die "$NAME is a $VM_TYPE, not --type=$TYPE; give that type, another --name, or delete it with down."
        return ;;
      PREEMPTED | TERMINATED) delete ;;
      STOPPED | STOPPING | HIDDEN | HIDING)
        die "$NAME is $VM_STATE; start it (gcloud compute tpus tpu-vm start $NAME) or delete it with down." ;;
      '')
        if ((QUEUED)); then
          advance_queue
        elif ! create; then
          ((patient)) || die "$NAME could not be created. $(remedy "no more capacity")"
          sleep "$POLL_S"
        fi ;;
      *) sleep "$POLL_S" ;;
    esac
    ((SECONDS < deadline)) ||
      die "no $TYPE within --wait_s=$WAIT_S; the same command waits on (a queued one keeps its place), down gives up."
  done
}
