"`make lab` serves the project: every link and picture of every page can be opened, and in a browser the pages are whole, legible and run."

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from test_contract import NOTEBOOKS, cells, source, tagged

ROOT = Path(__file__).resolve().parent.parent
BOOK = ['nbs/index.ipynb', *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').glob('[0-9]*.ipynb'))]
CHROMIUM = shutil.which('chromium') or '/usr/bin/chromium'
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
FLAGS += ' --disable-component-update --disable-sync'
SETTINGS = {  # of this JupyterLab: all cells are in the page, nothing is saved, no news is asked for
    'notebook-extension/tracker': dict(windowingMode='none'),
    'docmanager-extension/plugin': dict(autosave=False),
    'apputils-extension/notification': dict(fetchNews='false'),
}


def texts(nb):  # what a notebook writes in Markdown or HTML, itself or by its outputs
    outputs = [o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', ())]
    of_outputs = [''.join(d[k]) for d in outputs for k in ('text/markdown', 'text/html') if k in d]
    return [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown'] + of_outputs


def wanted(page):  # what markdown, of the page and of its outputs, links to or shows, as paths of the project
    nb = json.loads(page.read_text())
    links = [m for t in texts(nb) for m in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', t)]
    names = {(a or b).split('#')[0] for a, b in links}
    names = {n for n in names if n and not re.match(r'[a-z]+:', n)}
    return {os.path.relpath((page.parent / n).resolve(), ROOT) for n in names}


def pictures(nb):  # how many there are to see
    drawn = sum(k.startswith('image/') for c in nb['cells'] for o in c.get('outputs', ()) for k in o.get('data', {}))
    return drawn + sum(len(re.findall(r'!\[[^\]]*\]\(|<img\b', t)) for t in texts(nb))


@pytest.fixture(scope='module')
def lab(tmp_path_factory):  # what JupyterLab and its kernels keep of a user is in a folder of its own
    own = tmp_path_factory.mktemp('lab')
    names = 'JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR'
    folders = {k: str(own / k) for k in f'{names} IPYTHONDIR'.split()}
    for name, settings in SETTINGS.items():
        file = own / 'JUPYTERLAB_SETTINGS_DIR' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    more = f'--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token=t'
    more += ' --ServerApp.ip=127.0.0.1 --allow-root --LabApp.expose_app_in_browser=True'
    more += f' --FileCheckpoints.checkpoint_dir={own / "checkpoints"}'
    p = subprocess.Popen(
        ['make', '-s', 'lab', f'MORE={more}'],
        cwd=ROOT,
        env=os.environ | folders,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def get(path):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/{path}', headers=dict(Authorization='token t'))
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as e:
            return e.code

    try:
        for _ in range(240):
            try:
                get('api')
                break
            except OSError:
                assert p.poll() is None
                time.sleep(0.5)
        yield SimpleNamespace(get=get, address=f'http://127.0.0.1:{port}/')
    finally:
        p.terminate()
        try:
            p.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()


def test_the_first_page_and_all_that_it_shows_can_be_opened(lab):
    assert lab.get('lab/tree/nbs/index.ipynb') == 200
    pages = {p.relative_to(ROOT).as_posix(): wanted(p) for p in NOTEBOOKS}
    assert any(w.startswith('figures/') for w in pages['nbs/index.ipynb'])
    broken = {(k, w): s for k, ws in pages.items() for w in ws if (s := lab.get(f'files/{w}')) != 200}
    assert not broken
    assert lab.get('files/no-such-file') == 404


# In a browser. What is asked of a page that JupyterLab shows:
SET = """([cells, pictures]) => {
  const all = s => [...document.querySelectorAll('.jp-Notebook ' + s)];
  const prose = [...all('.jp-MarkdownCell .jp-MarkdownOutput'), ...all('.jp-OutputArea-output.jp-RenderedMarkdown')];
  return all('.jp-Cell').length == cells && all('img').length == pictures && prose.every(e => e.childElementCount)
    && all('.jp-MarkdownCell').every(e => e.querySelector('.jp-MarkdownOutput'))
    && all('img').every(e => e.getAttribute('src'));
}"""
NOT_LOADED = """async () => {
  document.querySelectorAll('.jp-Notebook details').forEach(e => e.open = true);
  const wrong = [];
  for (const e of document.querySelectorAll('.jp-Notebook img')) {
    e.scrollIntoView();
    if (!e.complete) await new Promise(done => { e.onload = e.onerror = done; });
    if (!e.naturalWidth) wrong.push(e.src.slice(0, 100));
  }
  return wrong;
}"""
BROKEN_INTERVALS = r"""() => {
  const number = String.raw`[+\-−]?(?:\d*\.\d+|\d+(?=\s?%))\s?%?`, block = 'p,li,td,th,pre,h1,h2,h3,h4,blockquote,summary,dt,dd';
  const interval = new RegExp(String.raw`(?:${number}\s)?\(${number}\s(?:to|–)\s${number}\)`, 'g'), broken = [];
  let found = 0;
  for (const b of document.querySelectorAll(`.jp-Notebook :is(.jp-RenderedHTMLCommon, .jp-OutputArea-output) :is(${block})`)) {
    const nodes = [], walk = document.createTreeWalker(b, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) if (walk.currentNode.parentElement.closest(block) == b) nodes.push(walk.currentNode);
    const place = at => { for (const n of nodes) { if (at <= n.length) return [n, at]; at -= n.length; } };
    for (const m of nodes.map(n => n.data).join('').matchAll(interval)) {
      const range = document.createRange();
      range.setStart(...place(m.index));
      range.setEnd(...place(m.index + m[0].length));
      const lines = [...range.getClientRects()].filter(r => r.width);
      found += lines.length > 0;
      if (Math.max(...lines.map(r => r.top)) >= Math.min(...lines.map(r => r.bottom)) - 1) broken.push(m[0]);
    }
  }
  return [found, broken];
}"""
ILLEGIBLE = """least => {
  const one = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true}), known = {};
  const rgba = c => {
    if (!known[c]) {
      one.clearRect(0, 0, 1, 1);
      one.fillStyle = c;
      one.fillRect(0, 0, 1, 1);
      const d = one.getImageData(0, 0, 1, 1).data;
      known[c] = [d[0], d[1], d[2], d[3] / 255];
    }
    return known[c];
  };
  const over = (top, low) => [0, 1, 2].map(k => top[k] * top[3] + low[k] * (1 - top[3]));
  const ground = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      layers.push(rgba(getComputedStyle(e).backgroundColor));
      if (layers.at(-1)[3] == 1) break;
    }
    return layers.reduceRight((low, top) => over(top, low), [255, 255, 255]);
  };
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const wrong = [], seen = new Set();
  let read = 0;
  for (const area of document.querySelectorAll('.jp-Notebook .jp-MarkdownOutput, .jp-Notebook .jp-OutputArea-output')) {
    const walk = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const e = walk.currentNode.parentElement;
      if (!walk.currentNode.data.trim() || seen.has(e) || e.closest('.jp-InternalAnchorLink, mjx-assistive-mml') || !e.checkVisibility()) continue;
      seen.add(e);
      read += 1;
      const low = ground(e), [a, b] = [light(low), light(over(rgba(getComputedStyle(e).color), low))];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (contrast < least) wrong.push(`${contrast.toFixed(1)}: ${e.textContent.trim().slice(0, 60)}`);
    }
  }
  for (const e of document.querySelectorAll('.jp-Notebook img')) {
    if (!e.naturalWidth) continue;
    const c = new OffscreenCanvas(64, 64).getContext('2d');
    c.drawImage(e, 0, 0, 64, 64);
    const clear = c.getImageData(0, 0, 64, 64).data.some((v, i) => i % 4 == 3 && v < 250);
    if (clear && light(ground(e)) < 0.7) wrong.push(`the dark is seen through ${e.alt || e.src.slice(0, 60)}`);
  }
  return [read, wrong];
}"""
RUN = """([command, seconds]) => Promise.race([
  window.jupyterapp.commands.execute(command).then(() => true), new Promise(r => setTimeout(r, seconds * 1000, false))])"""
OPEN = """path => window.jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook'}).then(() => 0)"""
CLOSE = """async () => {
  const w = window.jupyterapp.shell.currentWidget;
  await w.context.sessionContext.shutdown();
  w.dispose();
}"""
WIDTH = "document.querySelector('.jp-Notebook').clientWidth"
LEFT = "window.jupyterapp.commands.execute('application:toggle-left-area').then(() => 0)"
SIDES = ('with the list of files', 'without it')
THEMES = dict(light='JupyterLab Light', dark='JupyterLab Dark')
LEAST = 4.5  # contrast of text and ground: WCAG 2.2, level AA


class Shown:
    "A JupyterLab in a browser, and what is seen in it."

    def __init__(self, page, address, sync):
        self.page, self.address, self.expect = page, address, sync.expect
        self.timeout, self.errors = sync.TimeoutError, []
        page.set_default_timeout(120_000)
        page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: self.errors.append(str(e)))
        page.on('request', lambda r: self.errors.append(r.url) if not r.url.startswith(self.own) else None)

    @property
    def own(self):
        return self.address, self.address.replace('http', 'ws'), 'data:', 'blob:'

    def whole(self, nb, timeout=120_000):  # waits until all is there that the file holds
        self.page.wait_for_function(SET, arg=[len(nb['cells']), pictures(nb)], timeout=timeout)

    def start(self, theme='light'):  # no page is open, no kernel runs
        self.page.goto(f'{self.address}lab?reset&token=t')
        self.page.wait_for_selector('.jp-Launcher')
        self.page.evaluate('window.jupyterapp.serviceManager.sessions.shutdownAll()')
        self.theme(theme)

    def close(self):  # with its kernel, and without asking whether to save
        self.page.evaluate(CLOSE)
        self.expect(self.page.locator('.jp-Notebook')).to_have_count(0)

    def open(self, path, nb=None):  # `nb` is shown instead of what the file holds
        def changed(route):
            answer = route.fetch()
            said = answer.json()
            route.fulfill(response=answer, json=said | (dict(content=nb) if said.get('content') else {}))

        if nb:
            self.page.route(re.compile(rf'/api/contents/{path}(\?|$)'), changed)
        self.page.evaluate(OPEN, path)
        self.whole(nb or json.loads((ROOT / path).read_text()))
        self.idle()

    def idle(self):
        self.expect(self.page.get_by_text('| Idle')).to_be_visible()

    def restart(self):
        self.page.evaluate("window.restarted = window.jupyterapp.commands.execute('notebook:restart-kernel'); 0")
        self.page.locator('.jp-Dialog').get_by_role('button', name='Confirm Kernel Restart').click()
        self.page.evaluate('window.restarted.then(() => 0)')
        self.idle()

    def run_all(self):  # -> errors and warnings that are shown
        assert self.page.evaluate(RUN, ['notebook:run-all-cells', 300]), 'Run All did not end'
        return self.page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()

    def theme(self, name):
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme}).then(() => 0)", THEMES[name]
        )
        self.page.wait_for_function('name => document.body.dataset.jpThemeName == name', arg=THEMES[name])

    def look(self, theme):  # the theme that is there; ends in the other one
        page = self.page
        seen = dict(missing=page.evaluate(NOT_LOADED))
        for name in (theme, other := next(k for k in THEMES if k != theme)):
            if name == other:
                self.theme(other)
            seen[name] = page.evaluate(ILLEGIBLE, LEAST)
        narrow = dict(width=760, height=1000)
        steps = {SIDES[0]: lambda: page.set_viewport_size(narrow), SIDES[1]: lambda: page.evaluate(LEFT)}
        for side, step in steps.items():
            width = page.evaluate(WIDTH)
            step()
            page.wait_for_function(f'width => ({WIDTH}) != width', arg=width)
            seen[side] = page.evaluate(BROKEN_INTERVALS)
        page.evaluate(LEFT)
        page.set_viewport_size(dict(width=1400, height=1000))
        seen['errors'], self.errors[:] = self.errors[:], []
        return seen, other


@pytest.fixture(scope='module')
def browser(lab):
    if not Path(CHROMIUM).exists():
        pytest.skip('chromium is not installed: apt-get install chromium')
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    sync.expect.set_options(timeout=120_000)
    with sync.sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())

        def start():
            size = dict(width=1400, height=1000)
            return Shown(b.new_context(viewport=size, reduced_motion='reduce').new_page(), lab.address, sync)

        yield start
        b.close()


def stored():
    return {k: (ROOT / k).read_bytes() for k in BOOK}


@pytest.fixture(scope='module')
def walked(browser, lab):
    "Every page of the book, opened from what `make lab` opens: what was seen of each."
    shown, theme, walked, before = browser(), 'light', {}, stored()
    shown.page.goto(f'{lab.address}?token=t')
    shown.whole(json.loads(before[BOOK[0]]))
    shown.idle()
    shown.theme(theme)
    assert shown.page.url.startswith(f'{lab.address}lab/tree/{BOOK[0]}')
    shown.expect(shown.page.locator('.jp-Notebook h1')).to_contain_text('cxrpaper')
    walked[BOOK[0]], theme = shown.look(theme)
    shown.page.locator('.jp-Notebook a', has_text='01_data').first.click()
    shown.page.locator('.jp-Notebook h1', has_text='The data').wait_for()
    shown.idle()
    assert not shown.errors
    shown = browser()
    shown.start(theme)
    for name in BOOK[1:]:
        shown.open(name)
        walked[name], theme = shown.look(theme)
        shown.close()
    assert stored() == before  # whoever looks changes nothing
    return walked


def test_every_page_of_the_book_is_whole_in_a_browser(walked):
    assert list(walked) == BOOK
    wrong = {k: w for k, seen in walked.items() if (w := seen['missing'] + seen['errors'])}
    assert not wrong


@pytest.mark.parametrize('theme', THEMES)
def test_every_page_can_be_read_in_the_light_and_in_the_dark(walked, theme):
    assert all(seen[theme][0] > 20 for seen in walked.values())
    wrong = {k: seen[theme][1] for k, seen in walked.items() if seen[theme][1]}
    assert not wrong


@pytest.mark.parametrize('side', SIDES)
def test_no_interval_breaks_over_lines_at_760_pixels(walked, side):
    assert walked['nbs/06_tables.ipynb'][side][0] > 100
    broken = {k: seen[side][1] for k, seen in walked.items() if seen[side][1]}
    assert not broken


def page_of(*planted):
    return nbformat.read(ROOT / BOOK[0], 4) | dict(cells=list(planted))


def code(**data):
    return new_code_cell('1', outputs=[new_output('display_data', {k.replace('_', '/'): v for k, v in data.items()})])


def drawn(transparent):  # black letters
    fig, ax = plt.subplots(figsize=(2, 1))
    fig.savefig(file := io.BytesIO(), transparent=transparent)
    plt.close(fig)
    return base64.b64encode(file.getvalue()).decode()


def test_what_is_planted_in_a_page_is_seen(browser, lab):
    broken, whole = ' '.join(f'{"x" * k} 0.64 (0.61 to 0.67)' for k in range(40)), '0.64\xa0(0.62\xa0to\xa00.67) ' * 40
    good = [new_markdown_cell('# Planted\n\n![seen](../figures/figure2.png)'), new_markdown_cell(whole)]
    good += [code(text_markdown=whole), code(image_png=drawn(False))]
    bad = [new_markdown_cell('![not there](../figures/no-such.png)'), new_markdown_cell(broken)]
    bad += [code(text_markdown=broken), code(image_png=drawn(True))]
    shown = browser()
    shown.start()
    shown.open(BOOK[1], page_of(*good))
    seen, theme = shown.look('light')
    assert not seen['missing'] + seen['errors'] + seen['light'][1] + seen['dark'][1]
    assert [seen[k] for k in SIDES] == [[80, []]] * 2
    shown.close()
    shown.open(BOOK[2], page_of(*good, *bad))
    shown.page.add_style_tag(content='.jp-RenderedMarkdown h1 { color: #666 !important }')
    seen, _ = shown.look(theme)
    assert [k.split('/')[-1].split('?')[0] for k in seen['missing']] == ['no-such.png'] and len(seen['errors']) == 1
    assert not seen['light'][1] and [w[:4] for w in seen['dark'][1]] == ['3.3:', 'the ']
    assert all(seen[k][0] == 160 and set(seen[k][1]) == {'0.64 (0.61 to 0.67)'} for k in SIDES)
    shown.close()
    shown.open(BOOK[3], page_of(*good))
    with pytest.raises(shown.timeout):  # a page that lacks a cell, and one that lacks a picture
        shown.whole(page_of(*good, new_markdown_cell('one more')), timeout=500)
    with pytest.raises(shown.timeout):
        shown.whole(page_of(*good[:-1], code(image_png='', image_jpeg='')), timeout=500)


def test_a_training_by_run_all_shows_its_curves_and_again_after_a_restart(browser, lab, tmp_path):
    shown, path, before = browser(), 'nbs/04_finetune.ipynb', stored()
    shown.start()
    nb = nbformat.read(ROOT / path, 4)
    small = dict(arch='resnet10t', pretrain='none', px=32, epochs=2, workers=1, run=str(tmp_path / 'run'))
    (given,) = tagged(nb)
    given['source'] = '\n'.join([source(given), *(f'{k} = {v!r}' for k, v in small.items())])
    hidden = [c['metadata'].get('jupyter', {}).get('source_hidden') for c in cells(nb)]
    numbers = [f'[{k}]:' for k, h in enumerate(hidden, 1) if not h]
    shown.open(path, nb)
    says = shown.page.locator('.jp-Notebook', has_text='resnet10t, pre-training: none, phantom, smoke profile')
    curves = shown.page.locator('.jp-Notebook .jp-RenderedImage img')
    shown.expect(says).to_have_count(0)
    runs = []
    for k in range(2):
        if k:
            shown.restart()
        assert shown.run_all() == []
        shown.expect(says).to_have_count(1)
        shown.expect(curves).to_have_count(1)
        assert shown.page.evaluate(NOT_LOADED) == []
        prompts = shown.page.locator('.jp-CodeCell .jp-InputPrompt').all_inner_texts()
        assert [p for p in prompts if p] == numbers  # every cell once, by a kernel that is new
        runs.append({f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / 'run').iterdir()})
    assert 'predictions.csv' in runs[0] and runs[0] == runs[1]  # trained once
    shown.page.evaluate("window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells[1].setSource('1 / 0')")
    assert 'ZeroDivisionError' in shown.run_all()[0]
    assert not shown.errors and stored() == before
