#!/usr/bin/env bash
# Checks launch/slurm/train.sbatch on a SLURM of two nodes that lives only as long as this script:
#
#   tests/launch/slurm/run.sh        # or: make test-slurm
#
# Needs root, and installs Debian's slurm-wlm and munge where they are missing. Keys, sockets,
# state and logs are in a temporary folder; the daemons listen on 127.0.0.1 only.
set -euo pipefail
cd "$(dirname "$0")/../../.."

if [ "$(id -u)" != 0 ]; then
    echo "error: the SLURM test starts daemons that only root can; run it as root." >&2
    exit 1
fi
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        echo "error: no SLURM and no apt-get to install it with; install slurmctld, slurmd and munge." >&2
        exit 1
    fi
    echo "installing slurm-wlm and munge"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y slurm-wlm munge >/dev/null
fi

base=$(mktemp -d "${TMPDIR:-/tmp}/gemwright-slurm.XXXXXX")
chmod 755 "$base" # munge's clients must reach its socket
mkdir -p "$base"/{state,spool/n1,spool/n2,pid,log,jobs}
export SLURM_CONF=$base/slurm.conf
check=

stop_daemon() { # PIDFILE: ends it and waits until it is gone
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL "$pid" 2>/dev/null || true
}

clean_up() {
    local rc=$?
    trap - EXIT INT TERM
    set +e
    if [ -n "$check" ] && kill "$check" 2>/dev/null; then
        wait "$check"
    fi
    if [ -f "$base/pid/slurmctld.pid" ]; then
        timeout 10 scancel --user=root
        for _ in $(seq 100); do # jobs outlive slurmd: wait for them first
            [ -n "$(timeout 10 squeue --noheader --states=all --format=%T | grep -E 'RUNNING|COMPLETING|PENDING')" ] || break
            sleep 0.2
        done
    fi
    for daemon in slurmd.n1 slurmd.n2 slurmctld munged; do
        stop_daemon "$base/pid/$daemon.pid"
    done
    rm -rf "$base"
    exit "$rc"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

host=$(hostname -s)
cat >"$SLURM_CONF" <<CONF
ClusterName=gemwright
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge.socket,cred_expire=15
CryptoType=crypto/munge
MpiDefault=none
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/pid/slurmctld.pid
SlurmdPidFile=$base/pid/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=15
ReturnToService=2
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
# Two GPUs a node that are none: the script counts its processes by them.
printf 'NodeName=n[1-2] Name=gpu File=%s\n' /dev/null /dev/zero >"$base/gres.conf"

dd if=/dev/urandom of="$base/munge.key" bs=1024 count=1 status=none
chmod 400 "$base/munge.key"
munged --key-file="$base/munge.key" --socket="$base/munge.socket" --pid-file="$base/pid/munged.pid" \
    --seed-file="$base/state/munge.seed" --log-file="$base/log/munged.log"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 50); do
    [ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l)" = 2 ] && break
    sleep 0.2
done
sinfo --Node --long
if [ "$(sinfo --noheader --Node --states=idle --format=%N | wc -l)" != 2 ]; then
    grep -hE 'error|fatal' "$base"/log/*.log | grep -vE 'mpi/|MPI|state file' | tail -n 20 >&2
    echo "error: the two SLURM nodes did not come up; above are the daemons' last errors." >&2
    exit 1
fi

export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1 # the same sums with two processes a node as with four
.venv/bin/python tests/launch/slurm/check.py "$base/jobs" &
check=$!
rc=0
wait "$check" || rc=$?
check=
exit "$rc"
