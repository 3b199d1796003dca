"`make reproduce`: fresh tables against committed ones."

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cxrpaper.paper.reproduce import committed_files, read_cells, read_spread, reproduce, written_files
from cxrpaper.runs import InputError, project_root

ROOT = project_root()
STUDY = 'config/phantom.yaml'


def command(*words):
    return subprocess.run(
        [Path(sys.executable).parent / 'cxr_reproduce', STUDY, *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def copy(tmp_path):
    "The committed tables in a folder of their own."
    shutil.copytree(ROOT / 'figures', tmp_path / 'figures', ignore=shutil.ignore_patterns('*.svg', '*.png', 'spread'))
    return tmp_path / 'figures'


def moved(copy, by, rows=None):
    "Change the primary metric of some rows of Table 2."
    t = pd.read_csv(copy / 'table2.csv')
    hit = (t.metric == 'auc_macro') & (t.row.isin(rows) if rows else True)
    t.loc[hit, 'value'] += by
    t.to_csv(copy / 'table2.csv', index=False)


def test_the_same_tables_are_identical(copy):
    cells, changed, (outside, n, p) = reproduce(STUDY, copy)
    assert set(cells.status) == {'identical'} and not changed and outside == 0 and n > 5 and p == 1


def test_many_rows_far_away_fail_and_are_named(copy):
    for name in ('table2', 'table3', 'table4'):
        t = pd.read_csv(copy / f'{name}.csv')
        t.loc[t.metric == 'auc_macro', 'value'] -= 0.2
        t.to_csv(copy / f'{name}.csv', index=False)
    r = command('--against', copy)
    assert r.returncode == 1 and 'outside' in r.stdout and 'binomial p 0.000' in r.stdout


def test_a_little_is_within_and_a_changed_verdict_is_said_first(copy):
    sd, _ = read_spread()['auc_macro']
    moved(copy, 0.5 * sd)
    t = pd.read_csv(copy / 'table7.csv')
    t.loc[0, 'answer'] = 'not passed' if t.answer[0] == 'passed' else 'passed'
    t.to_csv(copy / 'table7.csv', index=False)
    r = command('--against', copy)
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.startswith('verdict changed: ' + t.question[0]) and 'within' in r.stdout


def test_committed_tables_are_read_out_of_git():
    try:
        old = committed_files('figures')
    except InputError as e:
        pytest.skip(f'not a clone: {e}')
    assert set(old) == set(written_files('figures'))
    assert len(read_cells(old)) > 500
