"`make bench` at its smallest sizes: every benchmark works, says which library is missing, and fails where one fails."

import os
import subprocess
import sys

import numpy as np
import pandas as pd

from cxrpaper.runs import project_root


def bench(out, *names, before=''):
    "The command of `make bench`, tiny; `before`: a folder that is searched for libraries first."
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=str(before))
    command = [sys.executable, 'tests/benchmark.py', '--tiny', str(out), *names]
    return subprocess.run(command, cwd=project_root(), env=env, capture_output=True, text=True)


def test_every_benchmark_has_its_lines(tmp_path):
    was = (project_root() / 'figures/benchmarks/benchmarks.csv').read_bytes()
    r = bench(tmp_path / 'out')
    assert r.returncode == 0, r.stderr[-4000:]
    t = pd.read_csv(tmp_path / 'out/benchmarks.csv')
    lines = dict(jobs=1, steps=1, moco=3, ingest=9, evaluation=3, scaling=6)
    assert t.groupby('group').size()[list(lines)].to_dict() == lines
    assert (np.isfinite(t.ratio) | np.isfinite(t.seconds)).all() and (t.seconds.dropna() > 0).all()
    assert np.isfinite(t[t.against.notna()][['ours', 'other', 'ratio']]).all(axis=None)
    assert not t.note.fillna('').str.contains('not installed').any()
    table = [l for l in (tmp_path / 'out/benchmarks.md').read_text().splitlines() if l.startswith('| ')]
    assert len(table) == 1 + len(t)
    assert (tmp_path / 'out/scaling.svg').is_file()
    assert (project_root() / 'figures/benchmarks/benchmarks.csv').read_bytes() == was


def test_a_missing_library_is_said_and_what_fails_fails_the_command(tmp_path):
    for name, fault in dict(
        lightly="ModuleNotFoundError('', name='lightly')", nbformat="RuntimeError('planted')"
    ).items():
        (tmp_path / f'{name}.py').write_text(f'raise {fault}')
    r = bench(tmp_path / 'out', 'moco', 'jobs', 'steps', before=tmp_path)
    assert r.returncode == 1 and 'RuntimeError: planted' in r.stderr
    (line,) = pd.read_csv(tmp_path / 'out/benchmarks.csv').itertuples()
    assert (line.group, line.what, line.note) == ('moco', 'moco: not measured', 'lightly is not installed')
    assert 'lightly is not installed' in (tmp_path / 'out/benchmarks.md').read_text()
