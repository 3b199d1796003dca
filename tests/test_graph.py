"What the graph runs again after a change, after a failure, and on which GPU. Notebooks are not executed: a papermill of a few lines stands in."

import fcntl
import json
import os
import re
import shutil
import subprocess
import time

import psutil
import pytest
import yaml
from test_study import ROOT, STUDY, command, environment

# writes down what it was asked to make and its GPUs, which it holds for a while, or as long as there is wait/<name>; fails while there is a line in fail/<name>
PAPERMILL = r'''#!/usr/bin/env bash
name=$(sed 's|.tmp$||; s|^runs/smoke/||; s|/[.]|/|; s|.ipynb$||' <<<"$7"); gpus=(${CUDA_VISIBLE_DEVICES//,/ }); echo "$name ${gpus[*]}" >>started
for g in ${gpus[@]}; do mkdir held-$g || echo "$g $name" >>held-twice; done
sleep $(cat seconds); while [ -e wait/${name//\//-} ]; do sleep .05; done
for g in ${gpus[@]}; do rmdir held-$g; done
if [ -s fail/${name//\//-} ]; then sed -i 1d fail/${name//\//-}; exit 1; fi
date +%N >"$7"
'''


def program(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def clone(to, seconds=0, digests=True, **changes):
    "The project's sources in a folder of their own, and the stand-in for papermill. Who asks for GPUs and locks only does without digests of the code: two of three seconds of each start."
    to.mkdir()
    for d in ('nbs', 'cxrpaper', 'config'):
        shutil.copytree(ROOT / d, to / d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'Snakefile'):
        shutil.copy(ROOT / f, to / f)
    if not digests:
        assert (text := (to / 'Snakefile').read_text()).count('functools.cache(job_digest)') == 1
        (to / 'Snakefile').write_text(text.replace('functools.cache(job_digest)', 'str'))
    (to / 'config' / 'tiny.yaml').write_text(yaml.safe_dump(STUDY | changes))
    (to / 'seconds').write_text(str(seconds))
    (to / 'fail').mkdir()
    (to / 'wait').mkdir()
    program(to / 'bin' / 'papermill', PAPERMILL)
    return to


def env(root, **more):
    e = {k: v for k, v in environment(root).items() if k != 'CUDA_VISIBLE_DEVICES' and not k.startswith('SLURM_')}
    return e | dict(PATH=f"{root / 'bin'}:{e['PATH']}") | more


def snakemake(root, *more, **environ):
    r = subprocess.run(command(*more), cwd=root, env=env(root, **environ), capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


def started(root):
    return [l.split() for l in (root / 'started').read_text().splitlines()]


@pytest.fixture(scope='module')
def graph(tmp_path_factory):
    "A finished study; one training failed at first, twice, and the metadata baselines once, in the first of two runs."
    root = clone(tmp_path_factory.mktemp('graph') / 'clone')
    (root / 'fail' / 'finetune-resnet10t-none-fold1-seed0').write_text('1\n1\n')
    (root / 'fail' / 'baselines').write_text('1\n')
    first = snakemake(root, '--keep-going', '--resources', 'gpu=0')
    (root / 'started').rename(root / 'started-first')
    return root, first, snakemake(root, '--keep-going')


def test_a_failed_training_is_tried_again_and_the_rest_goes_on(graph):
    root, (first, _), (second, out) = graph
    names = [l.split()[0] for l in (root / 'started-first').read_text().splitlines()]
    assert first == 1 and names.count('finetune/resnet10t-none-fold1-seed0') == 3 and names.count('baselines') == 1
    assert (
        'moco/resnet10t' in names
        and 'finetune/resnet10t-moco-fold0-seed0' in names
        and 'representations' in names
        and 'tables' not in names
    )
    assert second == 0, out[-3000:]
    assert {n for n, *_ in started(root)} == {'baselines', 'tables', 'figures', *EVALUATION, 'results'}


def planned(root):
    "What a run would make now."
    rc, out = snakemake(root, '--dry-run')
    assert rc == 0, out[-3000:]
    made = [
        re.sub(r'(/04_finetune|/pretraining)?\.ipynb$', '', o.removeprefix('runs/smoke/'))
        for o in re.findall(r'(?m)^    output: (\S+)$', out)
    ]
    assert made or 'Nothing to be done' in out
    return set(made)


def change(root, file, what):
    "Decorate a definition of a module, which computes, or add a line to the last cell of a type of a notebook; returns what undoes it."
    f = root / file
    text = f.read_text()
    if file.endswith('.py'):
        assert f'\n{what}' in text
        f.write_text(text.replace(f'\n{what}', f'\n@(lambda o: o)\n{what}', 1))
    else:
        nb = json.loads(text)
        [c for c in nb['cells'] if c['cell_type'] == what][-1]['source'].append('\nchanged = True')
        f.write_text(json.dumps(nb))
    return lambda: f.write_text(text)


MOCO = {'moco/resnet10t', *(f'finetune/resnet10t-moco-fold{f}-seed0' for f in (0, 1))}
LABELS = {  # all labels are runs like those of the other tables
    f'{kind}/resnet10t-freeze-inpainting-{more}'
    for f in (0, 1)
    for kind, more in (('labels', f'labels0.5-fold{f}-draw0'), ('finetune', f'fold{f}-seed0'))
}
SCRATCH = {
    f'finetune/resnet10t-{r}-fold{f}-seed0' for f in (0, 1) for r in ('none', 'multitask-none', 'none-split_byimage')
}
EVALUATION = {'readiness', 'reports'}
PAGES = {'tables', 'figures', 'diagram', 'results'}  # that the study file, and every model, go into


def test_times_of_files_prose_and_the_number_of_gpus_run_nothing(graph):
    "As after a checkout: every source is newer than every result."
    root, *_ = graph
    undo = change(root, 'nbs/04_finetune.ipynb', 'markdown')
    study = (root / 'config' / 'tiny.yaml').read_text()
    try:
        (root / 'config' / 'tiny.yaml').write_text(yaml.safe_dump(STUDY | dict(gpus=1)))
        for d in ('nbs', 'cxrpaper', 'config'):
            for f in (root / d).rglob('*'):
                os.utime(f)
        assert planned(root) == PAGES | {'representations'} | EVALUATION, 'these read the study file'
        (root / 'config' / 'tiny.yaml').write_text(study)
        assert planned(root) == set()
    finally:
        undo()
        (root / 'config' / 'tiny.yaml').write_text(study)


@pytest.mark.parametrize(
    'what,expected',
    [
        (('cxrpaper/evaluation/report.py', 'def wide('), {'tables', 'results'} | EVALUATION),
        (('cxrpaper/training/moco.py', 'class InfoNCE('), MOCO | PAGES | {'representations', 'reports'}),
        (
            ('cxrpaper/training/finetune.py', 'def fit('),
            SCRATCH | LABELS | MOCO - {'moco/resnet10t'} | PAGES | EVALUATION,
        ),
        (('nbs/04_finetune.ipynb', 'code'), SCRATCH | LABELS | MOCO - {'moco/resnet10t'} | PAGES | EVALUATION),
    ],
)
def test_a_change_of_code_runs_what_depends_on_it(graph, what, expected):
    root, *_ = graph
    undo = change(root, *what)
    try:
        assert planned(root) == expected
    finally:
        undo()


def test_a_corpus_that_was_changed_is_read_again(tmp_path):
    "A label corrected, a radiograph exchanged: nothing that was made of the old ones is passed off as new."
    root = clone(
        tmp_path / 'clone', table3=[], table4=[], table6=None, readiness=None, pretraining=None, moco={}, inpainting={}
    )
    (root / 'data' / 'tiny').mkdir(parents=True)
    (table := root / 'data' / 'tiny' / 'train_study_level.csv').write_text('id\n')
    rc, out = snakemake(root)
    assert rc == 0, out[-3000:]
    assert planned(root) == set()
    table.write_text('id\nanother\n')
    everything = {'cohort', 'store', 'baselines', *(f'finetune/resnet10t-none-fold{f}-seed0' for f in (0, 1))}
    assert planned(root) == everything | PAGES
    rc, out = snakemake(root)
    assert rc == 0, out[-3000:]
    assert planned(root) == set()
    (root / 'data' / 'tiny' / 'a.dcm').touch()
    assert 'cohort' in planned(root)


@pytest.mark.parametrize('without_locks', [False, True])
def test_jobs_at_once_never_share_a_gpu(tmp_path, without_locks):
    "Four jobs at once on two GPUs: a training waits until one is free. Who asks for none sees none. Without the locks two would meet."
    root = clone(tmp_path / 'clone', 0.2, digests=False, gpus=1)
    program(
        root / 'bin' / 'nvidia-smi', '#!/bin/sh\necho "GPU 0: Made Up (UUID: GPU-a)\nGPU 1: Made Up (UUID: GPU-b)"\n'
    )
    if without_locks:
        assert (text := (root / 'Snakefile').read_text()).count('if flock -n $fd;') == 1
        (root / 'Snakefile').write_text(text.replace('if flock -n $fd;', 'if true;'))
        snakemake(root, '--cores', '4')
        assert (root / 'held-twice').exists()
        return
    rc, out = snakemake(root, '--cores', '4')
    assert rc == 0 and not (root / 'held-twice').exists(), out[-3000:]
    took = {n: g for n, *g in started(root)}
    assert all(
        len(g) == (n.startswith(('finetune/', 'labels/', 'moco/', 'inpainting/')) or n == 'readiness')
        for n, g in took.items()
    ), took
    assert {g for n in took for g in took[n]} == {'GPU-a', 'GPU-b'}


def test_trainings_share_a_gpu_as_far_as_it_has_places(tmp_path):
    "One GPU with two places: two meet on it, a third waits."
    root = clone(tmp_path / 'clone', digests=False, gpus=1)
    names = [f'resnet10t-{k}-seed0' for k in ('none-fold0', 'none-fold1', 'multitask-none-fold0')]
    for n in names:
        (root / 'wait' / f'finetune-{n}').touch()
    targets = [f'runs/smoke/finetune/{n}/04_finetune.ipynb' for n in names]
    p = subprocess.Popen(
        command('--nolock', *targets, '--cores', '4'),
        cwd=root,
        env=env(root, CUDA_VISIBLE_DEVICES='7', SLOTS='2'),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    trained = lambda: [n for n, *g in started(root) if n.startswith('finetune/')] if (root / 'started').exists() else []
    until(lambda: len(trained()) == 2)
    time.sleep(1)
    assert len(trained()) == 2, 'a third one took a place that is not there'
    for n in names:
        (root / 'wait' / f'finetune-{n}').unlink()
    assert p.wait(60) == 0 and len(trained()) == 3


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def locked(file):
    with open(file) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_killed_job_gives_its_gpu_back(tmp_path):
    "The GPU is held as long as the notebook runs, also when Snakemake is killed, and not longer. A user's CUDA_VISIBLE_DEVICES is kept to."
    root, name = clone(tmp_path / 'clone', digests=False, gpus=1), 'resnet10t-none-fold0-seed0'
    target, wait = f'runs/smoke/finetune/{name}/04_finetune.ipynb', root / 'wait' / f'finetune-{name}'
    wait.touch()
    p = subprocess.Popen(
        command('--nolock', target),
        cwd=root,
        env=env(root, CUDA_VISIBLE_DEVICES='7'),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until((root / 'held-7').exists)
    (lock,) = root.glob('.snakemake/gpu-*-7-1.lock')
    jobs = psutil.Process(p.pid).children(recursive=True)
    p.kill()
    p.wait()
    time.sleep(0.5)
    assert locked(lock)
    for j in jobs:
        if j.is_running():
            j.kill()
    psutil.wait_procs(jobs, timeout=10)
    assert not locked(lock)
    (root / 'held-7').rmdir()
    wait.unlink()
    rc, out = snakemake(root, '--nolock', target, CUDA_VISIBLE_DEVICES='7')
    assert rc == 0 and started(root)[-1] == [f'finetune/{name}', '7'], out[-3000:]


def test_a_study_that_needs_a_gpu_is_refused_without_one(tmp_path):
    root = clone(tmp_path / 'clone', digests=False, gpus=1)
    rc, out = snakemake(root, '--resources', 'gpu=0')
    assert (
        rc != 0
        and 'config/tiny.yaml takes 1 GPU a training and this machine has 0' in out
        and 'set gpus: 0' in out
        and not (root / 'started').exists()
    )
    rc, out = snakemake(
        root,
        '--resources',
        'gpu=1',
        '--retries',
        '0',
        '--',
        'runs/smoke/moco/resnet10t/pretraining.ipynb',
        CUDA_VISIBLE_DEVICES='',
    )
    assert (
        rc != 0
        and 'pretrain takes 1 GPU, here are 0' in out
        and {n for n, *_ in started(root)} == {'cohort', 'store', 'pretraining_phantom'}
    )


def test_a_job_that_runs_already_is_waited_for(tmp_path):
    root = clone(tmp_path / 'clone', digests=False)
    (root / '.snakemake').mkdir()
    with open(root / '.snakemake' / 'runs-smoke-logs-cohort.log.lock', 'w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        p = subprocess.Popen(
            command('runs/smoke/cohort.ipynb'),
            cwd=root,
            env=env(root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(
            lambda: (
                p.poll() is not None or any(c.name() == 'flock' for c in psutil.Process(p.pid).children(recursive=True))
            )
        )
        assert p.poll() is None and not (root / 'started').exists()
    assert p.wait(60) == 0 and started(root) == [['cohort']]
