"The graph on a cluster: as `make paper EXECUTOR=slurm` runs it, on a one-node SLURM of our own (tests/slurm.sh). Same bytes as without; a job that failed is sent again."

import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from test_graph import env, program, started
from test_study import BIN, ROOT, SINGLE, STUDY, again, clone, command, results

MISSING = [
    p
    for p in ('slurmctld', 'slurmd', 'munged', 'sbatch')
    if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f'not installed: {", ".join(MISSING)} (Debian: apt-get install slurm-wlm munge)'
    ),
    pytest.mark.skipif(os.getuid() != 0, reason='slurmd must be started by root'),
]
SMALL = STUDY | dict(
    gpus=1,
    folds=[0],
    finetune=dict(epochs=1, batch_size=8),
    table2=[SINGLE],
    table3=[],
    table4=[],
    table6=None,
    pretraining=None,
    readiness=None,
)

# papermill, which writes down the GPU it was given, hides it from PyTorch and, where there is a file fail, fails a training once
PAPERMILL = f'''#!/usr/bin/env bash
echo "$7 ${{CUDA_VISIBLE_DEVICES-}}" >>started; export CUDA_VISIBLE_DEVICES=
case $7 in */finetune/*) if [ -e fail ]; then rm fail; exit 1; fi;; esac
exec {BIN}/papermill "$@"
'''


def small(root):
    clone(root)
    (root / 'config' / 'tiny.yaml').write_text(yaml.safe_dump(SMALL))
    program(root / 'bin' / 'papermill', PAPERMILL)
    return root


def make(root, *options):
    "What `make paper` with these options would run, and its result on a SLURM of two made-up GPUs."
    recipe = subprocess.run(
        ['make', '--dry-run', '--silent', 'paper', *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [l for l in recipe.splitlines() if '.venv/bin/snakemake' in l]
    line = line.replace('.venv/bin/snakemake', str(BIN / 'snakemake'))
    return subprocess.run(
        [ROOT / 'tests' / 'slurm.sh', 'bash', '-c', line],
        cwd=root,
        env=env(root, SLURM_GPUS='2'),
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_slurm_makes_the_same_bytes_and_sends_a_failed_job_again(tmp_path):
    here = small(tmp_path / 'here')
    r = subprocess.run(command(), cwd=here, env=env(here, CUDA_VISIBLE_DEVICES='0,1'), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-6000:]
    there = again(tmp_path / 'there', here, ['runs', '.snakemake', 'data/stores', 'started'])
    (there / 'fail').touch()
    r = make(
        there,
        'PROFILE=tiny',
        'EXECUTOR=slurm',
        'JOBS=4',
        'PARTITION=all',
        'MORE=--slurm-status-command squeue --slurm-init-seconds-before-status-checks 2',
    )
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-9000:]
    assert results(there) == results(here) and 'table2.csv' in results(there)
    trainings = [l for l in started(there) if '/finetune/' in l[0]]
    assert len(trainings) == 2 and all(len(l) == 2 and l[1] in '01' for l in trainings), (
        'one failed, one did not, each with a GPU from SLURM'
    )
    assert len(started(there)) == len(started(here)) + 1 and not (there / 'fail').exists()
    assert sorted(f.name for f in there.glob('.snakemake/gpu-*')) == [], 'what SLURM gave needs no lock'


def test_nothing_is_left_behind():
    "The command's exit status comes through; daemons and folder are gone."
    r = subprocess.run(
        [
            ROOT / 'tests' / 'slurm.sh',
            'bash',
            '-c',
            'dirname $SLURM_CONF; cat $(dirname $SLURM_CONF)/*.pid; srun true; exit 3',
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    folder, *pids = r.stdout.split()
    assert r.returncode == 3 and len(pids) == 3 and not Path(folder).exists(), r.stderr
    assert not [
        p for p in map(int, pids) if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
    ]
