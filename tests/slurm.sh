#!/usr/bin/env bash
# A private one-node SLURM for as long as one command runs: tests/slurm.sh COMMAND...
# Needs slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge) and root, since slurmd does; nothing of a system's own SLURM is read or touched. SLURM_GPUS=n makes up n GPUs.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do command -v $program >/dev/null || { echo "missing: $program (Debian: apt-get install slurm-wlm munge)" >&2; exit 69; }; done
[ "$(id -u)" = 0 ] || { echo "slurmd must be started by root" >&2; exit 69; }
dir=$(mktemp -d); chmod 755 "$dir"; mkdir -m 755 "$dir/munge" "$dir/state" "$dir/spool"
host=$(hostname -s); gpus=${SLURM_GPUS:-0}
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
end() {
    code=$?; trap - EXIT INT TERM
    scancel --user="$(id -un)" 2>/dev/null || :
    for pid in slurmd slurmctld munged; do [ ! -s "$dir/$pid.pid" ] || kill "$(cat "$dir/$pid.pid")" 2>/dev/null || :; done
    for _ in $(seq 50); do pgrep -F "$dir/slurmd.pid" >/dev/null 2>&1 || pgrep -F "$dir/slurmctld.pid" >/dev/null 2>&1 || break; sleep .1; done
    [ $code = 0 ] || tail -n 20 "$dir"/*.log >&2 || :
    rm -rf "$dir"; exit $code
}
trap end EXIT INT TERM

(umask 077; head -c 128 /dev/urandom >"$dir/munge/key")
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --log-file="$dir/munged.log" --pid-file="$dir/munged.pid" --seed-file="$dir/munge/seed"
# no cgroups, no accounts: works in a container. squeue knows finished jobs for a day, which stands in for the accounting that sacct would ask
cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PluginDir=$(dirname "$(find /usr/lib -name auth_munge.so -path '*slurm*' | head -n 1)")
PlugStackConfig=/dev/null
$([ "$gpus" = 0 ] || echo GresTypes=gpu)
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=64000 $([ "$gpus" = 0 ] || echo Gres=gpu:$gpus) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
if [ "$gpus" != 0 ]; then for i in $(seq 0 $((gpus - 1))); do ln -s /dev/null "$dir/gpu$i"; echo "Name=gpu File=$dir/gpu$i"; done >"$dir/gres.conf"; fi
export SLURM_CONF=$dir/slurm.conf
mkdir "$dir/bin"; printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v srun)" >"$dir/bin/srun"; chmod 755 "$dir/bin/srun" # Snakemake starts srun without SLURM_CONF
export PATH=$dir/bin:$PATH
slurmctld
slurmd
for _ in $(seq 100); do [ "$(sinfo --noheader --format=%T 2>/dev/null)" != idle ] || break; sleep .2; done
[ "$(sinfo --noheader --format=%T)" = idle ] || { echo "the node did not come up" >&2; exit 70; }
"$@"
