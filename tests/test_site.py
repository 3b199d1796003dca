"The web pages: each fault that is planted in a site is found, and a whole site has none."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SPHINX = ROOT / '.site' / 'env' / 'bin' / 'python'
sys.path.insert(0, str(ROOT / 'tests' / 'website'))
import check
import pages

STATED = 'every word of this page stands here so that it is not taken for a page without any, which would be a fault'
PAGE = """<html><head><meta name="source-digest" content="{digest}"><link rel="stylesheet" href="a.css"></head>
<body><article><h1 id="top">One</h1>{words} <a href="two.html#top">two</a> <a href="#top">up</a> <a href="https://arxiv.org">out</a>
<span class="math">x</span><div class="cell_output"><img src="p.png"></div></article></body></html>"""
NOTEBOOK = dict(
    cells=[
        dict(cell_type='markdown', source='# One\n\n$x$ costs `$5` and 3$'),
        dict(cell_type='code', source='1', outputs=[dict(output_type='stream', text='1')]),
    ]
)


@pytest.fixture
def site(tmp_path):
    "A site of two pages as check.py reads one, and what it was made from."
    out, sources = tmp_path / 'html', tmp_path / 'source'
    for d in (out, sources):
        d.mkdir()
    for name in ('one', 'two'):
        (out / f'{name}.html').write_text(PAGE.format(digest=name * 4, words=STATED))
        (sources / f'{name}.ipynb').write_text(json.dumps(NOTEBOOK))
    (out / 'a.css').write_text('b { background: url(p.png) }')
    Image.linear_gradient('L').save(out / 'p.png')
    (sources / 'digests.json').write_text(json.dumps({k: k * 4 for k in ('one', 'two')}))
    return out, sources


def edit(file, was, to):
    text = file.read_text()
    assert was in text
    file.write_text(text.replace(was, to))


PLANTED = {
    'links to two.html#nowhere': lambda d: edit(d / 'one.html', 'two.html#top', 'two.html#nowhere'),
    'links to ../secret.html, which is not there': lambda d: edit(d / 'one.html', 'two.html#top', '../secret.html'),
    'two.html was not made': lambda d: (d / 'two.html').unlink(),
    'one.html is stale': lambda d: edit(d / 'one.html', 'oneone', 'other'),
    'one.html is empty: 6 words': lambda d: edit(d / 'one.html', STATED, 'few'),
    'one.html has 0 formulas': lambda d: edit(d / 'one.html', '<span class="math">x</span>', '$x$'),
    'one.html shows 0 outputs': lambda d: edit(d / 'one.html', 'cell_output', 'cell_input'),
    'shows p.png, which is blank': lambda d: Image.new('L', (8, 8), 255).save(d / 'p.png'),
    'shows p.png, which is no picture': lambda d: (d / 'p.png').write_bytes(b''),
    'links to p.png, which is not there': lambda d: (d / 'p.png').unlink(),
    'one.html loads https://cdn.example/a.js': lambda d: edit(
        d / 'one.html', '</head>', '<script src="https://cdn.example/a.js"></script></head>'
    ),
    'a.css loads //fonts.example/f': lambda d: edit(d / 'a.css', 'url(p.png)', 'url("//fonts.example/f")'),
}


def test_a_whole_site_has_no_fault(site):
    assert check.faults(*site) == []


@pytest.mark.parametrize('found', PLANTED)
def test_a_planted_fault_is_found(found, site, tmp_path):
    (tmp_path / 'secret.html').write_text('what lies beside the site is not of it')
    PLANTED[found](site[0])
    wrong = check.faults(*site)
    assert any(found in w for w in wrong), wrong
    assert len(wrong) <= 4


def test_a_changed_source_makes_its_page_stale(site):
    now = dict(one='oneoneoneone', two='changed')
    assert check.faults(*site, now) == ['two.html is stale: it was made from another state of its source']


def test_a_book_without_outputs_or_of_another_state_is_refused(tmp_path):
    results = pages.result_folders()['open']
    assert check.stale_book(pages.BOOK, results) == [], 'run `make book`'
    nb = json.loads(pages.BOOK[0].read_text())
    for c in nb['cells']:
        c['outputs'] = []
    (tmp_path / 'index.ipynb').write_text(json.dumps(nb))
    assert 'stored without outputs' in check.stale_book([tmp_path / 'index.ipynb'], results)[0]
    edit(Path(shutil.copy(pages.BOOK[0], tmp_path)), pages.state_of(results), '0' * 12)
    assert 'shows 000000000000' in check.stale_book([tmp_path / 'index.ipynb'], results)[0]


def test_every_notebook_module_and_table_has_a_page():
    "And what Sphinx is given has no link into the project that is not of the site, and no directive of nbdev."
    texts = pages.documents()
    names = {p.relative_to(ROOT).as_posix() for p in texts}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb') if '_' != p.name[0]} <= names
    assert {f'api/{m}.md' for m in pages.modules()} <= names and len(pages.modules()) > 50
    assert all(f'figures/open/table{k}.md' in names for k in (1, 2, 3, 4, 6, 7))
    assert not [p.name for p in pages.BOOK if '#| export' in texts[p] or '#| hide' in texts[p]]
    assert any('#| hide' in p.read_text() for p in pages.BOOK)
    index = texts[pages.BOOK[0]]
    assert f'{pages.REPOSITORY}/blob/main/CITATION.cff' in index and '](../CITATION.cff)' not in index


SOURCE = '''
CLASSES = ['a', 'b']


def read(
    path: str,  # of a *table*
    n: int | None = None,  # rows
) -> list:  # of rows
    "Reads `n` rows."


def _own(): ...


class Run:
    "A run."

    seed: int = 0  # of the draws

    def done(self, at): "Whether it is."


@patch
def again(self: Run, n=1): "Once more."
'''


def test_the_reference_says_what_the_source_says():
    docs = dict(pages.members(SOURCE))
    assert list(docs) == ['CLASSES', 'read', 'Run', 'Run.again']
    assert '{py:function} read(path, n=None)' in docs['read'] and 'Reads `n` rows.' in docs['read']
    assert (
        '| `n` | `int \\| None` | `None` | rows |' in docs['read']
        and '| `returns` | `list` |  | of rows |' in docs['read']
    )
    assert '| `seed` | `int` | `0` | of the draws |' in docs['Run'] and '{py:method} done(at)' in docs['Run']
    assert '{py:method} Run.again(n=1)' in docs['Run.again']


def test_long_code_is_folded_and_short_code_is_shown():
    cell = lambda text, **data: dict(source=text, metadata={}, outputs=[dict(data=data)] if data else [])
    assert not pages.folded(cell('#| export\ndef f(): ...')) and pages.folded(cell('x\n' * 30))
    assert pages.folded(cell('plot()', **{'image/png': ''})) and not pages.folded(cell('table', **{'text/html': ''}))
    assert pages.folded(cell('#| export\nimport json')) and pages.folded(cell('#| hide\nx = 1'))


def test_a_widget_is_shown_by_what_stands_beside_it(tmp_path):
    nb = json.loads((ROOT / 'nbs' / '03_moco.ipynb').read_text())
    widget = {'application/vnd.jupyter.widget-view+json': dict(model_id='x'), 'text/html': '<b>gallery</b>'}
    nb['cells'][-2]['outputs'] = [dict(output_type='display_data', metadata={}, data=widget)]
    nb['metadata']['widgets'] = {}
    (page := tmp_path / 'page.ipynb').write_text(json.dumps(nb))
    text = json.dumps(pages.staged(page, {page}))
    assert 'gallery' in text and 'widget' not in text


def looked_at(folder, *names):  # what look.py says, in the environment of the site
    call = [SPHINX, ROOT / 'tests' / 'website' / 'look.py', folder, *names]
    return subprocess.run(call, capture_output=True, text=True)


needs_sphinx = pytest.mark.skipif(not SPHINX.exists(), reason='`make site` installs Sphinx in .site/env')
needs_browser = pytest.mark.skipif(not shutil.which('chromium'), reason='no browser: apt-get install chromium')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "One page with a formula, a picture, folded code and links, made by the site's own configuration: what was built, of what."
    d = tmp_path_factory.mktemp('built')
    page = ROOT / 'nbs' / '03_moco.ipynb'
    nb = pages.staged(page, {page})
    nb['cells'] = [c for c in nb['cells'] if c['cell_type'] == 'code' or '.ipynb' not in ''.join(c['source'])]
    top = '# MoCo\n\nUp to [the loss](#the-loss-and-two-steps-without-gradient).'
    nb['cells'].insert(0, pages.markdown_cell(top, 'top'))
    (d / 'source' / 'nbs').mkdir(parents=True)
    (d / 'source' / 'nbs' / 'index.ipynb').write_text(json.dumps(nb))
    (d / 'source' / 'digests.json').write_text(json.dumps({'nbs/index': 'a' * 64}))
    call = [SPHINX, '-m', 'sphinx', '-q', '-W', '-c', ROOT / 'tests' / 'website', d / 'source', d / 'html']
    made = subprocess.run(call, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return d / 'html', d / 'source'


@needs_sphinx
def test_sphinx_makes_of_a_page_what_is_wanted(built):
    assert check.faults(*built) == []
    text = (built[0] / 'nbs' / 'index.html').read_text()
    assert text.count('Show code') > 3 and 'http://localhost:8888/lab/tree/nbs/index.ipynb' in text
    assert 'https://mybinder.org/v2/gh/cxrpaper/cxrpaper/main?urlpath=lab/tree/nbs/index.ipynb' in text
    assert 'https://colab.research.google.com/github/cxrpaper/cxrpaper/blob/main/nbs/index.ipynb' in text
    assert 'begin with the three lines' in text
    assert (built[0] / '_static' / 'tex-svg-full.js').stat().st_size > 2_000_000


@needs_sphinx
@needs_browser
def test_a_browser_sees_a_page_whole_and_leaves_the_machine_for_nothing(built):
    said = looked_at(built[0], 'nbs/index.html', '--axe')
    assert said.returncode == 0, said.stdout + said.stderr


@needs_sphinx
@needs_browser
def test_a_browser_sees_what_is_planted(tmp_path):
    head = '<!DOCTYPE html><html lang="en"><head><link rel="icon" href="data:,"><title>t</title></head><body>'
    body = '<article><img src="no.png"><span class="math">x</span><p style="width: 900px">wide</p></article>'
    planted = '<script>console.error("planted")</script><img src="http://192.0.2.1/pixel.png">'
    (tmp_path / 'good.html').write_text(f'{head}<article>nothing</article></body></html>')
    (tmp_path / 'bad.html').write_text(f'{head}{body}{planted}</body></html>')
    assert looked_at(tmp_path, 'good.html').returncode == 0
    said = looked_at(tmp_path, 'bad.html', '--axe')
    wanted = 'console: planted|leaves the machine: http://192.0.2.1|no picture|not set: x|wider than a screen of 760|image-alt'
    assert said.returncode == 1 and not [w for w in wanted.split('|') if w not in said.stdout], said
