#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd, on the loopback interface only.
#
#   tests/slurm/cluster.sh up DIR [accounting] [Key=Value ...]
#                                      start it; everything it keeps lies in DIR. Then: export SLURM_CONF=DIR/slurm.conf
#                                      accounting: with a slurmdbd and a MariaDB of its own; Key=Value: for slurm.conf
#   tests/slurm/cluster.sh down DIR    end its jobs and daemons; the files stay for a look
#
# Needs Debian's slurm-wlm and munge; accounting needs slurmdbd and mariadb-server too. Root is not needed. Several clusters may be up
# at once, each in a DIR and on ports of its own.
# Partitions: tiny (both nodes, the default; 2 GPUs that exist in name only on each, at most 2 hours), one (node1), low
# (both nodes, which jobs in tiny may take from it: its jobs are requeued) and away (a node of another machine, which is never up).
set -euo pipefail
verb=${1:-} dir=${2:-}
[[ ($verb == up || $verb == down) && -n $dir ]] || { grep '^# ' "$0" | sed 's/^# //; 1d' >&2; exit 2; }
shift 2
accounting=no settings=()
for option in "$@"; do
  case $option in
    accounting) accounting=yes ;;
    *=*) settings+=("$option") ;;
    *) echo "unknown option $option: accounting, or Key=Value for slurm.conf" >&2; exit 2 ;;
  esac
done
mkdir -p "$dir" && dir=$(cd "$dir" && pwd)
export SLURM_CONF=$dir/slurm.conf MYSQL_UNIX_PORT=$dir/mariadb.socket PATH=$PATH:/usr/sbin:/sbin

alive() { [[ -f $1 ]] && grep -qs '^State:.[^Z]' "/proc/$(<"$1")/status"; }
wait_for() {  # SECONDS COMMAND...
  local until=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do (( SECONDS < until )) || return 1; sleep 0.1; done
}
gone() { ! alive "$1"; }

stop() {
  set +e  # whatever goes wrong, the rest is to end too
  if alive "$dir/slurmctld.pid"; then
    scancel --quiet --user="$(id -un)" || true
    wait_for 10 bash -c '[[ -z $(squeue -h) ]]' || true
  fi
  for name in slurmd-node1 slurmd-node2 slurmctld slurmdbd mariadb munged; do
    if alive "$dir/$name.pid"; then
      kill "$(<"$dir/$name.pid")" 2>/dev/null || true
      wait_for 10 gone "$dir/$name.pid" || kill -9 "$(<"$dir/$name.pid")" 2>/dev/null || true
    fi
    rm -f "$dir/$name.pid"
  done
  python3 - "$SLURM_CONF" <<'PY'  # what jobs have left behind: processes of this cluster only
import os, pathlib, signal, sys
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        is_step = (process / "cmdline").read_bytes().startswith(b"slurmstepd:") or b"SLURM_CLUSTER_NAME=proxt2i" in environment
        if is_step and b"SLURM_CONF=" + sys.argv[1].encode() in environment:
            os.kill(int(process.name), signal.SIGKILL)
    except OSError:
        pass
PY
}

if [[ $verb == down ]]; then stop; exit 0; fi
if alive "$dir/slurmctld.pid"; then echo "$dir: a cluster is up already"; exit; fi
for program in munged slurmctld slurmd sbatch srun; do
  command -v $program >/dev/null || { echo "no $program: apt-get install -y slurm-wlm munge" >&2; exit 3; }
done
for program in slurmdbd mariadbd mariadb-install-db; do
  [[ $accounting == no ]] || command -v $program >/dev/null || { echo "no $program: apt-get install -y slurmdbd mariadb-server" >&2; exit 3; }
done
trap 'echo "the cluster did not come up; the logs are in '"$dir"'" >&2; tail -n 3 "$dir"/*.log >&2; stop; exit 1' ERR

host=$(hostname -s)
read -r p0 p1 p2 p3 < <(python3 - <<'PY'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(s.getsockname()[1] for s in sockets))
PY
)
mkdir -p "$dir"/state "$dir"/spool-node1 "$dir"/spool-node2
chmod 755 "$dir"
(umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
cat >"$SLURM_CONF" <<CONF
ClusterName=proxt2i
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$p0
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,default_queue_depth=100
KillWait=10
MinJobAge=3600
RebootProgram=/bin/false
NodeName=far NodeHostname=another-machine NodeAddr=127.0.0.1 Port=1 CPUs=16 RealMemory=4000 State=DOWN Reason=is_no_node
NodeName=node[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$p1,$p2] CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=tiny Nodes=node[1-2] Default=YES MaxTime=2:00:00 PriorityTier=10 PreemptMode=off
PartitionName=one Nodes=node1 MaxTime=2:00:00 PriorityTier=10 PreemptMode=off
PartitionName=away Nodes=far MaxTime=2:00:00
PartitionName=low Nodes=node[1-2] MaxTime=2:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
CONF
printf '%s\n' "${settings[@]}" >>"$SLURM_CONF"
printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"  # must be devices, or the steps hear nothing of them
echo "CgroupAutomount=no" >"$dir/cgroup.conf"

munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
  --seed-file="$dir/munge.seed" --num-threads=2 --force >"$dir/munged.out" 2>&1
wait_for 10 munge --socket="$dir/munge.socket" -n
if [[ $accounting == yes ]]; then
  (umask 077; cat >"$dir/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$p3
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
PidFile=$dir/slurmdbd.pid
LogFile=$dir/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$(id -un)
StorageLoc=slurm
CONF
  )
  cat >>"$SLURM_CONF" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$p3
AccountingStoragePass=$dir/munge.socket
CONF
  # Reached by its socket alone; whoever runs this is its root, and needs no password.
  mariadb-install-db --no-defaults --user="$(id -un)" --auth-root-authentication-method=socket --auth-root-socket-user="$(id -un)" \
    --datadir="$dir/mariadb" --skip-test-db >"$dir/mariadb.log" 2>&1
  mariadbd --no-defaults --user="$(id -un)" --datadir="$dir/mariadb" --socket="$MYSQL_UNIX_PORT" --pid-file="$dir/mariadb.pid" --skip-networking \
    --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 >>"$dir/mariadb.log" 2>&1 &
  wait_for 30 mariadb --no-defaults --socket="$MYSQL_UNIX_PORT" --user=root -e "CREATE DATABASE slurm"
  slurmdbd 2>"$dir/slurmdbd.out"
  wait_for 30 sacctmgr -i add cluster proxt2i
fi
slurmctld -c -i 2>"$dir/slurmctld.out"
slurmd -N node1 2>"$dir/slurmd.out"
slurmd -N node2 2>>"$dir/slurmd.out"
two_idle() { [[ $(sinfo -h -N -p tiny -t idle -o %N | sort -u | wc -l) == 2 ]]; }
wait_for 20 two_idle
trap - ERR
echo "up: export SLURM_CONF=$SLURM_CONF"
