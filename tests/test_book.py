"The eleven pages: short enough to be read, stored with what they show, and of one state with the committed results."

import base64
import io
import json
import re
from html import escape
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbconvert import HTMLExporter
from PIL import Image

from cxrpaper.paper.contents import WIDGET, contents, page_facts, stale_pages, state_of, without_widgets

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'nbs' / 'index.ipynb', *sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))]
name = lambda p: p.stem


def cells(page, kind):
    return [c for c in json.loads(page.read_text())['cells'] if c['cell_type'] == kind]


def source(c):
    return ''.join(c['source'])


def words(page):
    return page_facts(page)['words']


def lines(page):
    return page_facts(page)['lines']


def shown(page):  # everything that its outputs say
    out = []
    for c in cells(page, 'code'):
        for o in c['outputs']:
            data = o.get('data', {})
            out += [''.join(o.get('text', '')), *(''.join(data.get(k, '')) for k in ('text/markdown', 'text/plain'))]
    return '\n'.join(out)


def pictures(page):
    outputs = [o.get('data', {}) for c in cells(page, 'code') for o in c['outputs']]
    found = [''.join(d.get('image/png', '')) for d in outputs]
    found += [m for d in outputs for m in re.findall('data:image/png;base64,([^"]+)', ''.join(d.get('text/html', '')))]
    return [Image.open(io.BytesIO(base64.b64decode(p))) for p in found if p]


def test_a_reader_finishes_it():
    assert len(PAGES) == 11
    assert sum(map(words, PAGES)) <= 9000 and sum(map(lines, PAGES)) <= 1800
    assert max(map(words, PAGES)) <= 1200
    assert len((ROOT / 'README.md').read_text().split()) <= 900  # with the bars of its tables


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_a_page_is_stored_with_what_it_shows(page):
    said = shown(page)
    assert said.strip(), 'run `make book`'
    assert not re.search(r'Traceback|Warning|\d+%\|', said), 'an error, a warning or a progress bar is stored'
    assert page.stat().st_size < 1_000_000
    linked = re.findall(r'!\[[^\]]+\]\((\.\./figures/[^)]+)\)', said + ''.join(map(source, cells(page, 'markdown'))))
    assert all((page.parent / f).is_file() for f in linked)
    assert pictures(page) or linked or page.stem == '06_tables', 'no picture is stored'


def untold(nb):  # pictures of a notebook without an alternative text that stands below them too
    out = []
    for c in nb['cells']:
        outputs = c.get('outputs', [])
        for o, below in zip(outputs, [*outputs[1:], {}]):
            if 'image/png' not in o.get('data', {}):
                continue
            alt = o.get('metadata', {}).get('image/png', {}).get('alt', '')
            if len(alt.split()) < 6 or alt not in ''.join(below.get('data', {}).get('text/markdown', '')):
                out.append(c.get('id'))
    return out


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_who_does_not_see_a_picture_is_told_what_it_shows(page):
    "By its alternative text, and by the same words below it, since JupyterLab shows no alternative text of an output."
    nb = json.loads(page.read_text())
    assert untold(nb) == [], 'show it with show_figure'
    texts = ''.join(map(source, cells(page, 'markdown'))) + shown(page)
    assert not re.search(r'!\[\s*\]\(', texts), 'a linked picture without an alternative text'
    bare = json.loads(page.read_text())
    n = 0
    for o in (o for c in bare['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})):
        o['metadata'], n = {}, n + 1
    assert len(untold(bare)) == n


def test_alternative_texts_reach_the_page():
    "In the HTML that nbviewer makes."
    nb = nbformat.read(ROOT / 'nbs' / '05_metrics.ipynb', as_version=4)
    html, _ = HTMLExporter(template_name='basic').from_notebook_node(nb)
    alts = [
        o.metadata['image/png']['alt']
        for c in nb.cells
        for o in c.get('outputs', [])
        if 'image/png' in o.get('data', {})
    ]
    assert len(alts) == 2 and all(escape(a) in html for a in alts)


def test_a_head_tells_each_picture_by_its_caption(monkeypatch):
    "What `show_figure` says below a figure is its alternative text at the head of an executed page too."
    import matplotlib.pyplot as plt

    from cxrpaper.jobs import Report
    from cxrpaper.paper import contents

    monkeypatch.setattr(contents, 'display', lambda *what, **how: None)
    said, report = ['Left: loss by epoch & AUC.', 'Masks of 4 radiographs.'], Report({}, print)
    report.asked = {}
    figures = [plt.figure(figsize=(1, 1)) for _ in said]
    for fig, says in zip(figures, said):
        contents.show_figure(fig, says)
    report.came_out('text', *figures)
    assert re.findall(r'<img alt="([^"]*)"', report._repr_html_()) == [escape(s) for s in said]


def test_no_widget_is_stored():
    "It would be an empty box, and its state could hold what was sent to it."
    for page in PAGES:
        nb = json.loads(page.read_text())
        assert nb == without_widgets(json.loads(page.read_text())), f'{page.name}: run `make book`'
    nb['cells'][-1] = dict(cell_type='code', outputs=[dict(data={WIDGET: {'model_id': 'a'}})])
    assert without_widgets(json.loads(json.dumps(nb))) != nb


def test_the_gallery_is_of_phantoms_and_loads_nothing():
    page = ROOT / 'nbs' / '09_reader.ipynb'
    assert 'phantom: ' in shown(page) and len(pictures(page)) == 8
    html = [''.join(o.get('data', {}).get('text/html', '')) for c in cells(page, 'code') for o in c['outputs']]
    assert {m[:22] for m in re.findall('(?:src|href)="([^"]+)', ''.join(html))} == {'data:image/png;base64,'}


@pytest.mark.parametrize('page', PAGES[1:], ids=name)
def test_a_page_opens_with_its_question_and_its_place(page):
    first = source(cells(page, 'markdown')[0])
    assert re.search(r'\*[A-Z][^*]+\?\*', first) and re.search(r'DICOM → .*\*\*.+\*\*', first)


def other_state(tables, card, verdict, said_06, said_08):  # what the stored pages do not show of the committed results
    flat = lambda s: ' '.join(s.replace('\xa0', ' ').split())
    gone = [k for k, t in tables.items() if flat(t) not in flat(said_06)]
    gone += [q for q, r in zip(card.question, card.result) if flat(str(r)) not in flat(said_08)]
    return gone + [v for v in [verdict] if v.lower() not in flat(said_08).lower()]


def test_the_pages_show_the_committed_results():
    at = ROOT / 'figures' / 'open'
    tables = {k: (at / f'table{k}.md').read_text() for k in (1, 2, 3, 4, 6)}
    card = pd.read_csv(at / 'table7.csv', keep_default_na=False)
    verdict = json.loads((at / 'table7.json').read_text())['verdict']
    stored = [shown(ROOT / 'nbs' / f'{k}.ipynb') for k in ('06_tables', '08_readiness')]
    assert other_state(tables, card, verdict, *stored) == [], 'run `make book`'
    moved = {k: t.replace('2', '3', 1) for k, t in tables.items()}
    assert set(other_state(moved, card, verdict, *stored)) == {k for k in tables if moved[k] != tables[k]}


def listed(text):  # link, what the page explains; minutes are left out, they change with every word
    return set(re.findall(r'^\| \[[^\]]+\]\(([^)]+)\) \| (.+?) \|', text, re.M))


def test_the_list_of_the_appendix_is_of_today():
    "contents.ipynb is read on GitHub, where nothing runs: what it has stored is the list of the pages that are there."
    at = ROOT / 'nbs' / 'appendix'
    pages = [p for p in sorted(at.glob('*/*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    from_here = lambda text: {(k[3:] if k.startswith('../') else f'paper/{k}', v) for k, v in listed(text)}
    stored, now = shown(at / 'paper' / 'contents.ipynb'), listed(contents(pages, at))
    assert from_here(stored) == now and len(now) == len(pages), 'run `make book`'
    assert from_here(stored.replace('(../data/download.ipynb)', '(../data/gone.ipynb)')) != now


def test_the_pages_say_the_state_of_the_results(tmp_path):
    at, told = (
        ROOT / 'figures' / 'open',
        [p for p in PAGES if p.stem in ('index', '06_tables', '07_figures', '08_readiness')],
    )
    assert stale_pages(told, state_of(at)) == [], 'run `make book`'
    copy = tmp_path / 'open'
    copy.mkdir()
    for f in at.glob('*.json'):
        (copy / f.name).write_text(f.read_text())
    assert state_of(copy) == state_of(at)
    moved = json.loads((copy / 'table3.json').read_text())
    moved['files']['table3.csv'] = '0' * 64
    (copy / 'table3.json').write_text(json.dumps(moved))
    assert [p for p, _ in stale_pages(told, state_of(copy))] == told
    empty = json.loads(told[1].read_text())
    for c in empty['cells']:
        if c['cell_type'] == 'code':
            c['outputs'] = []
    (tmp_path / 'empty.ipynb').write_text(json.dumps(empty))
    assert 'not executed' in stale_pages([tmp_path / 'empty.ipynb'], state_of(at))[0][1]
