"What a page has stored belongs to its code: a change of either is found, prose is not one; a page is stored whole or not at all."

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests' / 'website'))
import check
import stored

PAGES = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CELLS = dict(double='#| export\ndef double(x):\n    "Twice."\n    return 2 * x', shown='print(double(21))  # of 21')


def notebook(**cells):
    code = [
        dict(cell_type='code', id=k, metadata={}, execution_count=None, outputs=[], source=s.splitlines(True))
        for k, s in cells.items()
    ]
    prose = dict(cell_type='markdown', id='prose', metadata={}, source=['# Page\n', '> It doubles.'])
    about = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    return dict(cells=[prose, *code], metadata=about, nbformat=4, nbformat_minor=5)


def write(page, nb):
    page.write_text(json.dumps(nb, indent=1))
    return page


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "A page that was executed and stored."
    page = write(tmp_path_factory.mktemp('pages') / 'page.ipynb', notebook(**CELLS))
    assert stored.stale(page) == 'was never stored'
    assert stored.main([str(page)]) == 0
    return page


def test_every_page_shows_what_its_code_shows():
    assert check.stale_outputs(PAGES) == []


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_no_page_shows_a_warning_or_a_place_on_a_machine(page):
    assert stored.faults(json.loads(page.read_text())) == []


def test_a_stored_page_is_not_executed_again(page, capsys):
    nb = json.loads(page.read_text())
    assert stored.stale(page) is None and nb['cells'][2]['outputs'][0]['text'] == ['42\n']
    assert stored.main([str(page)]) == 0 and '0 of 1 pages' in capsys.readouterr().out


def source(text):
    return lambda nb, k: nb['cells'][k].update(source=text.splitlines(True))


CHANGES = {
    'code': (lambda nb: source('print(double(22))')(nb, 2), True),
    'code of an exported cell': (lambda nb: source(CELLS['double'].replace('2', '3'))(nb, 1), True),
    'an output': (lambda nb: nb['cells'][2]['outputs'][0].update(text=['43\n']), True),
    'no outputs': (lambda nb: nb['cells'][2].update(outputs=[]), True),
    'a cell less': (lambda nb: nb['cells'].pop(2), True),
    'cells in another order': (lambda nb: nb['cells'].reverse(), True),
    'prose': (lambda nb: source('# Page\n> It makes more.')(nb, 0), False),
    'more prose': (lambda nb: nb['cells'].insert(1, dict(nb['cells'][0], id='more')), False),
    'a comment': (lambda nb: source('# of 21\nprint(\n    double(21))')(nb, 2), False),
    'a warning': (
        lambda nb: nb['cells'][2]['outputs'].append(dict(output_type='stream', name='stderr', text=['careful'])),
        True,
    ),
    'a docstring': (lambda nb: source(CELLS['double'].replace('Twice', 'Two times'))(nb, 1), False),
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_makes_a_page_stale(change, page, tmp_path):
    how, found = CHANGES[change]
    how(nb := json.loads(page.read_text()))
    said = check.stale_outputs([write(tmp_path / 'page.ipynb', nb)])
    assert said == (['page.ipynb has stored outputs that are not of its code: run `make book`'] if found else [])


FAULTS = {
    'a cell fails': 'double(None)',
    'a progress bar is shown': 'print("50%|")',
    'a place on this machine': 'print("/tmp/runs/3")',
    'bytes, at most': 'print("123456789\\n" * 110_000)',
}


@pytest.mark.parametrize('found', FAULTS)
def test_a_page_that_cannot_be_stored_is_named_and_stays_whole(found, page, tmp_path, capsys):
    nb = json.loads(page.read_text())
    nb['cells'].append(notebook(last=FAULTS[found])['cells'][1])
    was = write(tmp_path / 'planted.ipynb', nb).read_bytes()
    assert stored.main([str(tmp_path / 'planted.ipynb')]) == 1
    said = capsys.readouterr().out
    assert 'planted.ipynb' in said and found in said
    assert [p.name for p in tmp_path.iterdir()] == ['planted.ipynb'] and (
        tmp_path / 'planted.ipynb'
    ).read_bytes() == was


def test_what_each_execution_draws_anew_is_not_stored(tmp_path):
    folder = 'import os, tempfile\nd = tempfile.TemporaryDirectory()\nprint(os.path.join(d.name, "a.csv"))'
    styled = 'import pandas as pd\npd.DataFrame(dict(a=[1])).style'
    twice = []
    for _ in range(2):
        stored.store(page := write(tmp_path / 'page.ipynb', notebook(folder=folder, styled=styled)))
        twice.append(page.read_text())
    assert twice[0] == twice[1] and '.../a.csv' in twice[0] and 'T_style_row0_col0' in twice[0]


def test_what_a_gpu_showed_is_kept_while_its_code_is_the_same(page, tmp_path):
    cells = CELLS | dict(gpu="#| cuda\nprint('here')", never='#| eval: false\nprint(1 / 0)')
    page = write(tmp_path / 'page.ipynb', notebook(**cells))
    shows = lambda k: [
        o['text'] for c in json.loads(page.read_text())['cells'] for o in c.get('outputs', []) if c['id'] == k
    ]
    stored.store(page, has_gpu=True)
    assert shows('gpu') == [['here\n']] and shows('never') == []
    nb = json.loads(page.read_text())
    nb['cells'][3]['outputs'][0]['text'] = ['on a GPU\n']
    assert stored.store(write(page, copy.deepcopy(nb))) == ['cell gpu needs a GPU: it keeps what it showed']
    assert shows('gpu') == [['on a GPU\n']] and stored.stale(page) is None
    nb['cells'][3]['source'] = ['#| cuda\n', "print('new')"]
    assert stored.store(write(page, nb)) == [] and shows('gpu') == [['new\n']]


def test_a_warning_is_told_and_not_stored(tmp_path):
    warns = 'import warnings\nwarnings.simplefilter("always")\nwarnings.warn("careful")\nprint(1)'
    notes = stored.store(page := write(tmp_path / 'page.ipynb', notebook(warns=warns)))
    assert (
        len(notes) == 1
        and 'careful' in notes[0]
        and 'careful' not in str(json.loads(page.read_text())['cells'][1]['outputs'])
    )
    nb = json.loads(page.read_text())
    nb['cells'][1]['outputs'].append(dict(output_type='stream', name='stderr', text=['careful']))
    assert 'a warning is shown' in stored.faults(nb)[0][1]
