"""Check the web pages that were built: python tests/website/check.py _docs .site/source; exit status 1 where something is wrong.

Every link, anchor and picture leads somewhere and nothing is loaded from elsewhere; every formula of the sources is one of the pages;
every stored output is shown and belongs to the code above it; no page is empty or made from another state of its source than the one that is there now.
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image
from stored import stale

from cxrpaper.paper.contents import stale_pages, state_of

LOADS = dict(script='src', img='src', iframe='src', source='src', video='src', audio='src', embed='src', object='data')
FORMULA = re.compile(r'\$\$.+?\$\$|(?<![\\$\w])\$(?![\s$])(?:[^$\n]*[^\s$\\])?\$(?![\w$])', re.S)


class Page(HTMLParser):
    "What a page links to, loads, shows and says."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.ids, self.words = [], [], set(), 0
        self.formulas = self.outputs = self.article = 0
        self.digest, self.pictures = None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        classes = a.get('class', '').split()
        self.ids |= {a[k] for k in ('id', 'name') if k in a}
        self.formulas += 'math' in classes
        self.outputs += 'cell_output' in classes
        self.article += tag == 'article'
        if tag == 'meta' and a.get('name') == 'source-digest':
            self.digest = a['content']
        if tag == 'a' and 'href' in a:
            self.links.append(a['href'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload'):
            self.loaded.append(a['href'])
        if tag in LOADS and LOADS[tag] in a:
            self.loaded.append(a[LOADS[tag]])
            self.pictures += [a['src']] if tag == 'img' else []

    def handle_endtag(self, tag):
        self.article -= tag == 'article'

    def handle_data(self, data):
        self.words += len(data.split()) if self.article else 0


def outward_loads(name: str, page: Page, site: Path) -> list:
    "What a page or a style sheet takes from another machine when it is looked at."
    return [f'{name} loads {u}' for u in page.loaded if urlsplit(u).netloc]


def style_loads(site: Path) -> list:
    found = {
        f: re.findall(r'(?:@import\s+|url\()["\']?((?:https?:)?//[^"\')\s]+)', f.read_text())
        for f in site.rglob('*.css')
    }
    return [f'{f.relative_to(site)} loads {u}' for f, us in found.items() for u in us]


def broken(name: str, pages: dict, site: Path) -> list:
    "Links and loaded files that are not there, and anchors that no element has."
    out = []
    for link in {*pages[name].links, *pages[name].loaded}:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        at = (site / name).parent / unquote(parts.path) if parts.path else site / name
        target = at.resolve()
        if not target.is_file() or not target.is_relative_to(site.resolve()):
            out.append(f'{name} links to {link}, which is not there')
        elif parts.fragment and target.suffix == '.html':
            to = pages.get(target.relative_to(site.resolve()).as_posix())
            if to and unquote(parts.fragment) not in to.ids:
                out.append(f'{name} links to {link}, and there is no such place in it')
    return out


def blank_pictures(name: str, page: Page, site: Path) -> list:
    "Pictures that cannot be decoded or show one colour only."
    out = []
    for src in page.pictures:
        file = (site / name).parent / unquote(urlsplit(src).path)
        if urlsplit(src).scheme or file.suffix not in ('.png', '.jpg', '.jpeg') or '_static' in file.parts:
            continue
        try:
            with Image.open(file) as im:
                low_high = im.convert('L').getextrema()
        except OSError:
            low_high = None
        if low_high is None or low_high[0] == low_high[1]:
            out.append(f'{name} shows {src}, which is {"no picture" if low_high is None else "blank"}')
    return out


def formulas(texts) -> int:  # of Markdown
    plain = (re.sub(r'```.*?```|`[^`\n]*`', '', t, flags=re.S) for t in texts)
    return sum(len(FORMULA.findall(t)) for t in plain)


def untrue(name: str, page: Page, source: Path) -> list:
    "What a notebook has and its page does not: outputs and formulas; and a page that says next to nothing."
    out = [] if page.words >= 20 else [f'{name} is empty: {page.words} words']
    if source.suffix == '.ipynb':
        cells = json.loads(source.read_text(encoding='utf-8'))['cells']
        join = lambda s: ''.join(s)
        stored = [o for c in cells for o in c.get('outputs', ())]
        texts = [join(c['source']) for c in cells if c['cell_type'] == 'markdown']
        texts += [join(o['data']['text/markdown']) for o in stored if 'text/markdown' in o.get('data', {})]
        wanted = sum(bool(c.get('outputs')) for c in cells), formulas(texts)
        if wanted[0] > page.outputs:
            out.append(f'{name} shows {page.outputs} outputs, its notebook has {wanted[0]} cells with some')
        if wanted[1] != page.formulas:
            out.append(f'{name} has {page.formulas} formulas, its notebook {wanted[1]}')
    return out


def faults(site: Path, sources: Path, now: dict = None) -> list:
    "Everything that is wrong with a site; `now`: digests of the sources as they are."
    site, files = Path(site), sorted(p for p in Path(site).rglob('*.html') if '_static' not in p.parts)
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in files}
    made, out = json.loads((sources / 'digests.json').read_text()), style_loads(site)
    for doc, was in made.items():
        page = pages.get(f'{doc}.html')
        if page is None:
            out.append(f'{doc}.html was not made')
        elif page.digest != (now or made).get(doc, was):
            out.append(f'{doc}.html is stale: it was made from another state of its source')
    for name, page in pages.items():
        source = next((f for s in ('.ipynb', '.md') if (f := sources / name.replace('.html', s)).exists()), None)
        out += outward_loads(name, page, site) + broken(name, pages, site) + blank_pictures(name, page, site)
        out += untrue(name, page, source) if source else []
    return out


def stale_book(book, results: Path) -> list:
    "Pages of the book that are stored without outputs, or show another state than the committed results."
    cells = {p: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in book}
    empty = [p for p, cs in cells.items() if not any(c.get('outputs') for c in cs)]
    told = [p for p in book if p.stem in ('index', '06_tables', '07_figures', '08_readiness')]
    return [f'{p.name}: stored without outputs, run `make book`' for p in empty] + [
        f'{p.name}: shows {what}, run `make book`' for p, what in stale_pages(told, state_of(results))
    ]


def stale_outputs(pages) -> list:
    "Pages, of the book and of the appendix, whose stored outputs are not of their code."
    why = {p: stale(p) for p in pages}
    run = lambda p: 'appendix' if 'appendix' in p.parts else 'book'
    return [f'{p.name} {w}: run `make {run(p)}`' for p, w in why.items() if w]


if __name__ == '__main__':
    from pages import BOOK, digests, notebooks, result_folders

    site, sources = map(Path, sys.argv[1:])
    wrong = stale_book(BOOK, result_folders()['open']) + stale_outputs(notebooks()) + faults(site, sources, digests())
    n = len(list(site.rglob('*.html')))
    size = sum(f.stat().st_size for f in site.rglob('*') if f.is_file()) / 2**20
    print('\n'.join(wrong) or f'{n} pages, {size:.0f} MiB: every link, picture, formula and output is there')
    raise SystemExit(bool(wrong))
