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
ANSWER = """
import json, sys
from cxrpaper.runs import code_digest
for line in sys.stdin:
    print(json.dumps({m: code_digest(m) for m in line.split()}), flush=True)
"""


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the package, and what asks it for its digests: one process, which reads again what has changed."
    root = tmp_path_factory.mktemp('digests')
    shutil.copytree(ROOT / 'cxrpaper', root / 'cxrpaper', ignore=shutil.ignore_patterns('__pycache__'))
    (root / 'nbs').mkdir()
    shutil.copy(ROOT / 'settings.ini', root)
    how = dict(cwd=root, env={'PYTHONPATH': str(root)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', ANSWER], **how) as p:

        def digests():
            print(*JOBS, file=p.stdin, flush=True)
            return json.loads(p.stdout.readline())

        yield root, digests, digests()
        p.stdin.close()


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
    root, digests, before = copy
    file = root / 'cxrpaper' / f'{module}.py'
    text = file.read_text()
    assert old in text
    if new is None:  # another statement of that name
        new = changed_statement(text, old)
    try:
        file.write_text(text.replace(old, new, 1))
        after = digests()
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
