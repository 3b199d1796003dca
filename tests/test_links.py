"Every link of a page leads to a file of the project and to a heading in it; headings make a table of contents."

import json
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TEXTS = sorted(ROOT.glob('*.md')) + [ROOT / 'tests' / 'README.md'] + sorted((ROOT / 'figures').rglob('*.md'))
name = lambda p: p.relative_to(ROOT).as_posix()


def prose(path, outputs=True):  # what is rendered as Markdown, in order
    if path.suffix != '.ipynb':
        return path.read_text(encoding='utf-8')
    parts = []
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        parts += [''.join(c['source'])] if c['cell_type'] == 'markdown' else []
        data = [o.get('data', {}) for o in c.get('outputs', [])] if outputs else []
        parts += [''.join(d['text/markdown']) for d in data if 'text/markdown' in d]
    return '\n\n'.join(parts)


def without_code(text):
    return re.sub(r'`[^`\n]*`', '', re.sub(r'(?ms)^```.*?^```', '', text))


def headings(text):  # [(level, words)]
    return [
        (len(m[1]), m[2].strip()) for m in re.finditer(r'(?m)^(#{1,6}) (.+)$', re.sub(r'(?ms)^```.*?^```', '', text))
    ]


def anchors(path):
    "The names of its headings: JupyterLab's in a notebook, GitHub's in a text."
    words = [w for _, w in headings(prose(path))]
    if path.suffix == '.ipynb':
        return {w.replace(' ', '-') for w in words}
    return {re.sub(r'[^\w\- ]', '', w.lower()).replace(' ', '-') for w in words}


def links(text):
    text = without_code(text)
    return re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def tracked():  # files that a fresh clone has; the other files of the project where git is not there
    r = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    return {ROOT / f for f in r.stdout.splitlines()} or {f for f in ROOT.rglob('*') if '.venv' not in f.parts}


FILES = tracked()
FOLDERS = {d for f in FILES for d in f.parents}


def broken(path, text):
    out = []
    for link in links(text):
        if re.match(r'[a-z]+:', link):
            continue
        file, _, anchor = unquote(link).partition('#')
        to = (path.parent / file).resolve() if file else path
        if to not in FILES and to not in FOLDERS:
            out.append(link)
        elif anchor and to.suffix in ('.ipynb', '.md') and anchor not in anchors(to):
            out.append(link)
    return out


@pytest.mark.parametrize('path', PAGES + TEXTS, ids=name)
def test_every_link_leads_somewhere(path):
    assert broken(path, prose(path)) == []


def test_a_link_that_leads_nowhere_is_found():
    index = ROOT / 'nbs' / 'index.ipynb'
    good = '[a](01_data.ipynb#Table-1) ![b](../figures/figure1.png) [c](../README.md#the-answers) [d](https://x.org/y)'
    assert broken(index, good) == [] and len(links(good)) == 4
    bad = '[a](01_data.ipynb#Table-9) ![b](../figures/figure0.png) [c](../README.md#answers) [d](../../outside.md)'
    assert broken(index, bad) == links(bad)
    assert len(links(prose(index))) > 20


def untidy(found):  # what makes a table of contents of headings unusable
    out = [] if [n for n, _ in found].count(1) == 1 and found[0][0] == 1 else ['not one title, in the first place']
    out += [f'{b[1]}: a level is left out' for a, b in zip(found, found[1:]) if b[0] > a[0] + 1]
    words = [w for _, w in found]
    return out + [f'{w}: twice' for w in sorted(set(words)) if words.count(w) > 1]


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_headings_make_a_table_of_contents(path):
    assert untidy(headings(prose(path, outputs=path.parent == ROOT / 'nbs'))) == []


def test_untidy_headings_are_found():
    assert untidy(headings('# A\n\n## B\n\n### C\n\n## D\n\n```\n# no heading\n```\n')) == []
    assert len(untidy(headings('# A\n\n### C\n\n## B\n\n## B\n'))) == 2
    assert len(untidy(headings('## A\n'))) == 1


def not_there(text):  # pages of the book, by number and name, that do not exist
    here = {p.stem for p in (ROOT / 'nbs').glob('*.ipynb')}
    return sorted(set(re.findall(r'(?<![\w/.-])0\d_[a-z]+(?!\w)', text)) - here)


def test_pages_that_comments_name_are_there():
    "In the comments of parameters and settings too, which no link checks."
    of = lambda p: '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'])
    texts = {p: of(p) for p in PAGES} | {p: p.read_text(encoding='utf-8') for p in (ROOT / 'config').glob('*.yaml')}
    assert {name(p): gone for p, t in texts.items() if (gone := not_there(t))} == {}
    assert not_there('which corpus that is (01_cohort), as 01_data says') == ['01_cohort']
