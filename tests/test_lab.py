"`make lab` serves the project: every link and picture of every page can be opened."

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_contract import NOTEBOOKS, source

ROOT = Path(__file__).resolve().parent.parent


def wanted(page):  # what markdown, of the page and of its outputs, links to or shows, as paths of the project
    nb = json.loads(page.read_text())
    texts = [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']
    outputs = [o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', ())]
    texts += [''.join(d[k]) for d in outputs for k in ('text/markdown', 'text/html') if k in d]
    links = [m for t in texts for m in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', t)]
    names = {(a or b).split('#')[0] for a, b in links}
    names = {n for n in names if n and not re.match(r'[a-z]+:', n)}
    return {os.path.relpath((page.parent / n).resolve(), ROOT) for n in names}


@pytest.fixture(scope='module')
def lab():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    more = f'--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token=t'
    more += ' --ServerApp.ip=127.0.0.1 --allow-root'
    p = subprocess.Popen(
        ['make', '-s', 'lab', f'MORE={more}'], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def get(path):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/{path}', headers=dict(Authorization='token t'))
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as e:
            return e.code

    try:
        for _ in range(120):
            try:
                get('api')
                break
            except OSError:
                assert p.poll() is None
                time.sleep(0.5)
        yield get
    finally:
        p.terminate()
        p.wait(20)


def test_the_first_page_and_all_that_it_shows_can_be_opened(lab):
    assert lab('lab/tree/nbs/index.ipynb') == 200
    pages = {p.relative_to(ROOT).as_posix(): wanted(p) for p in NOTEBOOKS}
    assert any(w.startswith('figures/') for w in pages['nbs/index.ipynb'])
    broken = {(k, w): s for k, ws in pages.items() for w in ws if (s := lab(f'files/{w}')) != 200}
    assert not broken
    assert lab('files/no-such-file') == 404
