"The page of results: it runs with nothing there and with a study there, every relative link leads somewhere, and what is wrong is said."

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cxrpaper.paper import provenance as R
from cxrpaper.runs import project_root, write_json
from cxrpaper.schema import METHODS, our_methods
from cxrpaper.study import read_study

ROOT = project_root()
BIN = Path(sys.executable).parent
PHANTOM = read_study('config/phantom.yaml')
RUNS = json.loads((ROOT / 'figures' / 'figure4.json').read_text())['runs']  # two of the study's runs


def executed_notebook(file, source, status=('completed', 'completed')):
    "A notebook as papermill leaves it, made up."
    cells = [
        nbformat.v4.new_code_cell('1', metadata=dict(papermill=dict(status=s, exception=s == 'failed'))) for s in status
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata=dict(
                papermill=dict(input_path=f'nbs/{source}', start_time='2026-01-02T03:04:05+00:00', duration=60.0)
            ),
        ),
        file,
    )


def clone(to, figures):
    to.mkdir()
    for d in ('nbs', 'cxrpaper', 'config') + (('figures',) if figures else ()):
        shutil.copytree(ROOT / d, to / d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', to)
    return to


def page(root, at='runs/phantom'):
    "Execute the notebook there; its outputs as one text."
    (root / at).mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ,
        'PYTHONPATH': str(root),
        'OMP_NUM_THREADS': '1',
        'PYTHONWARNINGS': 'ignore',
        'MPLBACKEND': 'agg',
    }
    r = subprocess.run(
        [
            BIN / 'papermill',
            '--no-progress-bar',
            '--log-level',
            'ERROR',
            'nbs/appendix/paper/provenance.ipynb',
            f'{at}/results.ipynb',
            '-p',
            'at',
            at,
            '-p',
            'study',
            'config/phantom.yaml',
        ],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return shown(root / at / 'results.ipynb')


def shown(file) -> str:
    outputs = [o.get('data', {}) for c in nbformat.read(file, 4).cells if c.cell_type == 'code' for o in c.outputs]
    return '\n\n'.join(''.join(d.get('text/markdown', d.get('text/html', ''))) for d in outputs)


def links(text) -> list:
    return [
        unquote(html.unescape(u))
        for u in re.findall(r'(?:href|src)="([^"]+)"', text) + re.findall(r'\]\(([^)\s]+)\)', text)
    ]


def broken(text, folder) -> list:
    return [u for u in links(text) if not re.match(r'https?:|#', u) and not (folder / u).exists()]


def test_with_nothing_run_it_says_what_to_do(tmp_path):
    text = page(clone(tmp_path / 'clone', False))
    assert (
        text.strip().startswith('> **The images are phantoms')
        and 'make paper PROFILE=phantom' in text
        and '0 of ' in text
    )
    assert not broken(text, tmp_path / 'clone' / 'runs' / 'phantom')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A clone with the committed figures, two of their runs (one made again since), two pages, a job that failed, and two files that no run made."
    root = clone(tmp_path_factory.mktemp('whole') / 'clone', True)
    for i, (run, p) in enumerate(RUNS.items()):
        executed_notebook(root / run / '04_finetune.ipynb', '04_finetune.ipynb')
        write_json(root / run / 'provenance.json', dict(key='other' if i else p['key'], device='a device'))
    for k in ('tables', 'figures'):
        executed_notebook(
            root / 'runs' / 'phantom' / f'{k}.ipynb', f"{dict(tables='06_tables', figures='07_figures')[k]}.ipynb"
        )
    executed_notebook(
        root / 'runs' / 'phantom' / 'finetune' / '.broken.ipynb',
        '04_finetune.ipynb',
        ('completed', 'failed', 'pending'),
    )
    executed_notebook(root / 'runs' / 'phantom' / 'moco' / 'cut.ipynb.tmp', '03_moco.ipynb', ('completed', 'pending'))
    (root / 'figures' / 'drawn by hand.png').write_bytes(b'x')
    f = root / 'figures' / 'table2.csv'
    f.write_text(f.read_text().replace('0.9', '0.8', 1))
    return root, page(root)


def test_every_link_leads_somewhere(whole):
    root, text = whole
    found = links(text)
    assert len(found) > 150 and not broken(text, root / 'runs' / 'phantom')
    for want in (
        '../../figures/table4.csv',
        '../../figures/table4.tex',
        '../../figures/figure4.svg',
        '../../figures/figure4.png',
        '../../figures/figure1.json',
        'tables.ipynb',
        'figures.ipynb',
        '../../nbs/06_tables.ipynb',
        f"{Path(next(iter(RUNS))).relative_to('runs/phantom')}/04_finetune.ipynb",
    ):
        assert want in found, want


def test_a_link_that_leads_nowhere_is_found(whole, tmp_path):
    "The counter-test: the page in another folder, and a file taken away."
    root, text = whole
    assert len(broken(text, tmp_path)) > 100
    assert broken(text.replace('table4.csv', 'table44.csv'), root / 'runs' / 'phantom') == ['../../figures/table44.csv']


def test_each_table_and_figure_is_shown_with_its_source(whole):
    root, text = whole
    names = sorted((f.stem for f in (root / 'figures').glob('*.json')), key=R.order)
    assert re.findall(r'(?m)^### (\w+)$', text) == names
    for n in names:
        part = text.split(f'### {n}\n')[1].split('\n### ')[0]
        side = json.loads((root / 'figures' / f'{n}.json').read_text())
        assert all(f in part for f in side['files']) and R.made_by(n) in part
        if n.startswith(('table', 'figure')):
            assert side['caption'] in part
        assert all(r in part for r in side['runs']) and ('<details>' in part) == (len(side['runs']) > 3)
        if n.startswith('figure'):
            assert f'src="../../figures/{n}.png"' in part
    assert '| tf_efficientnet_lite0, imagenet' in text  # a table's content


def test_what_is_wrong_is_said(whole):
    _, text = whole
    head, found = text.split('### table1')[0], text.split('### tripod_ai')[1]
    assert '2 of them did not reach the end' in head and 'failed in cell 1' in head and 'stopped before cell 1' in head
    assert (
        'Some tables or figures are older than their runs' in head
        and '1 of its runs were made again since' in text.split('### figure4\n')[1].split('\n### ')[0]
    )
    assert re.search(r'figures/drawn by hand.png\s*\| no provenance names it', found) and re.search(
        r'figures/table2.csv\s*\| edited', found
    )


def test_the_committed_figures_are_what_notebooks_wrote():
    assert R.audit('figures').empty, R.audit('figures').to_string()


def outdated(t: pd.DataFrame) -> pd.DataFrame:
    "Rows whose interval is not that of today's rules: fewer degrees of freedom than training runs allow, or limits that are not Student's."
    if 'df' not in t:
        return t[:0]
    one = pd.Series(np.nan, t.index)
    runs = t.get('n_runs', one).fillna(t.get('n_seeds', one))
    pretrained = '|'.join(METHODS[k].title for k in our_methods())  # of as many starts as pre-trainings
    ours = t.row.fillna('').str.contains(pretrained)
    starts = t.get('n_pretrainings', one).fillna(ours.map({True: 1.0, False: np.nan}))
    least = np.fmin(np.fmin(runs, starts), t.n_units) - 1
    half = stats.t.ppf(0.975, t.df) * t.se
    difference = t.metric.str.startswith('difference_') & (t.se > 0)
    return t[(t.df < least - 1e-9) | (difference & ((t.hi - t.value - half).abs() > 1e-9))]


def test_committed_tables_follow_the_rules_of_today():
    read = {f: pd.read_csv(f) for f in sorted((ROOT / 'figures').rglob('table[0-9].csv'))}
    del read[ROOT / 'figures' / 'spread' / 'table3.csv']  # of which nothing but the spread between seeds is read
    assert sum(len(t) for t in read.values() if 'df' in t) > 1000
    found = {str(f.relative_to(ROOT)): len(outdated(t)) for f, t in read.items()}
    assert not any(found.values()), {f: n for f, n in found.items() if n}
    t = read[ROOT / 'figures' / 'open' / 'table3.csv']
    assert len(outdated(t.assign(df=1.9))) > 100  # a verdict of fewer runs than there are
    assert len(outdated(t.assign(hi=t.hi + 0.01))) > 20


def test_figures_of_another_study_or_profile_are_marked(tmp_path):
    patients = PHANTOM | dict(
        name='no-such-study', profile='study', phantom=None, data_root='data/x', figures='figures'
    )
    said = R.overview(patients, 'config/study.yaml', R.executed(patients), R.artefacts(patients))
    assert (
        said.startswith('> **Tables and figures of another study (config/phantom.yaml)')
        and 'Not of patients, or of a small profile: table1' in said
    )
    nothing = patients | dict(figures=str(tmp_path))
    assert not R.overview(nothing, 'config/study.yaml', R.executed(nothing), R.artefacts(nothing)).startswith('>')


def test_index_of_many_runs_is_folded():
    jobs = pd.DataFrame(
        [
            dict(
                job=f'finetune/r{k}',
                path='settings.ini',
                notebook='04_finetune.ipynb',
                status='done',
                when='2026-01-02 03:04',
                wall_s=60.0,
                device='<x>',
            )
            for k in range(40)
        ]
        + [
            dict(
                job='tables',
                path='settings.ini',
                notebook='06_tables.ipynb',
                status='done',
                when='',
                wall_s=1.0,
                device='',
            )
        ]
    )
    text = R.index_html(jobs, 'nbs')
    assert (
        '<summary>finetune: 40 notebooks, 40 min in all</summary>' in text
        and text.index('>tables<') < text.index('<details>')
        and '<x>' not in text
    )
