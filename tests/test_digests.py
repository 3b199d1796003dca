"Which runs a change makes stale: what computes, and nothing else. Each change is made in a copy of the package."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAININGS = {'training.finetune', 'training.moco', 'training.inpainting'}
JOBS = [
    'data.phantom',
    'data.cohort',
    'data.store',
    'evaluation.baselines',
    *sorted(TRAININGS),
    'paper.tables',
    'paper.figures',
]
ASK = 'import json, sys; from cxrpaper.runs import code_digest; print(json.dumps({m: code_digest(m) for m in sys.argv[1:]}))'


def digests(root):
    r = subprocess.run(
        [sys.executable, '-c', ASK, *JOBS], cwd=root, env={'PYTHONPATH': str(root)}, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp('digests')
    shutil.copytree(ROOT / 'cxrpaper', root / 'cxrpaper', ignore=shutil.ignore_patterns('__pycache__'))
    (root / 'nbs').mkdir()
    shutil.copy(ROOT / 'settings.ini', root)
    return root, digests(root)


@pytest.mark.parametrize(
    'module,old,new,stale',
    [
        ('models/losses', '"""', '"""Said otherwise. ', set()),
        ('training/finetune', '\n\n# %%', '\n\n# a comment\n\n# %%', set()),
        ('data/phantom', 'def draw_ribs(', None, {'data.phantom'}),
        ('models/losses', 'class BalancedCE', None, {'training.finetune'}),
        ('training/moco', 'class InfoNCE', None, {'training.moco'}),
        ('training/augment', 'def augment(', None, TRAININGS),
        ('evaluation/report', 'COLOURS =', None, {'paper.tables', 'paper.figures'}),
    ],
    ids=['docstring', 'comment', 'rib', 'loss', 'moco loss', 'augmentation', 'colour'],
)
def test_a_change_makes_stale_what_computes_with_it(copy, module, old, new, stale):
    root, before = copy
    file = root / 'cxrpaper' / f'{module}.py'
    text = file.read_text()
    assert old in text
    if new is None:  # another statement of that name
        new = changed_statement(text, old)
    try:
        file.write_text(text.replace(old, new, 1))
        after = digests(root)
    finally:
        file.write_text(text)
    said = {m for m in JOBS if before[m] != after[m]}
    if module == 'evaluation/report':
        assert said <= stale and 'paper.figures' in said  # whoever draws
    else:
        assert said == stale


def changed_statement(text, old):
    "`old` with something that computes before or in it."
    start = text.index(old)
    line = text[start : text.index('\n', start)]
    if line.startswith(('class', 'def')):
        return f'@(lambda o: o)\n{old}'
    return old.replace('=', '= 0 or')
