"""The sources of the web pages, in one folder that Sphinx reads: notebooks as they are stored, the committed results, a page for each module.

`make site` runs this in the project's own environment, then Sphinx in another (requirements.lock), then check.py.
"""

import ast
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tokenize
from configparser import ConfigParser
from pathlib import Path

import yaml
from stored import NOTED

from cxrpaper.paper.contents import WIDGET, contents, figure_markdown, page_facts, state_of

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / 'nbs'
SETTINGS = ConfigParser(interpolation=None)
SETTINGS.read(ROOT / 'settings.ini', encoding='utf-8')
REPOSITORY = SETTINGS['DEFAULT']['git_url']
WINGS = 'data models evaluation training questions paper machine'.split()
BOOK = [NBS / 'index.ipynb', *sorted(NBS.glob('[0-9]*.ipynb'))]
RESULTS = dict(
    open='Real radiographs', phantom='Phantoms', location='Phantoms, place tells', nolocation='Phantoms, shape tells'
)  # config/<name>.yaml -> title of its page of results
MEASURED = sorted((ROOT / 'figures/benchmarks').glob('*.png'))  # pictures that a page shows
LONGEST = 25  # lines of code that are shown unfolded
LINK = re.compile(r'(\]\()([^)\s]+)(\))')


def source(cell):
    return ''.join(cell['source'])


def notebooks():
    "Every page of the project: the book, then the appendix by wings."
    return BOOK + [p for w in WINGS for p in sorted((NBS / 'appendix' / w).glob('*.ipynb'))]


def result_folders():  # of a study -> the folder that its tables and figures are committed to
    files = {k: yaml.safe_load((ROOT / 'config' / f'{k}.yaml').read_text(encoding='utf-8')) for k in RESULTS}
    return {k: ROOT / v['figures'] for k, v in files.items()}


# ---- notebooks


def folded(cell) -> bool:
    "Code that a reader opens if he wants it: imports, parameters, drawing, and what is long."
    text = source(cell)
    draws = any(k.startswith('image/') for o in cell['outputs'] for k in o.get('data', {}))
    first = text.lstrip().startswith(('#| hide', 'import ', 'from ')) or re.match(r'#\| export\s+(import|from)\b', text)
    parameters = 'parameters' in cell['metadata'].get('tags', []) or 'parameters(\n    globals()' in text
    return bool(draws or first or parameters or len(text.splitlines()) > LONGEST)


def outward(text: str, page: Path, inside) -> str:
    "Links to files of the project that are no part of the site lead to the repository."

    def turn(m):
        path, _, anchor = m[2].partition('#')
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if re.match(r'[a-z]+:', path) or not target.exists():
            return m[0]
        if target in inside:  # Jupyter's name of a heading to the site's
            return f'{m[1]}{path}#{slug(anchor)}{m[3]}' if anchor else m[0]
        kind = 'tree' if target.is_dir() else 'blob'
        return f'{m[1]}{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{"#" * bool(anchor)}{anchor}{m[3]}'

    return LINK.sub(turn, text)


def slug(anchor: str) -> str:
    return re.sub(r'[^\w-]', '', anchor.lower())


def markdown_cell(text: str, name: str) -> dict:
    return dict(cell_type='markdown', id=f'site-{name}', metadata={}, source=text)


def staged(path: Path, inside) -> dict:
    "A notebook for the site: the same cells and outputs; nbdev's directives left out, long code folded."
    nb, cells = json.loads(path.read_text(encoding='utf-8')), []
    for cell in nb['cells']:
        text = source(cell)
        if cell['cell_type'] == 'markdown':
            cells.append(cell | dict(source=outward(text, path, inside)))
            continue
        if text.startswith('#| default_exp') and len(text.splitlines()) == 1:
            continue
        how = ['remove-input'] if path == BOOK[0] else ['hide-input'] if folded(cell) else []
        tags = [*cell['metadata'].get('tags', []), *how]
        for o in cell['outputs']:
            if len(o.get('data', {})) > 1:  # without a kernel a widget is what it says beside itself
                o['data'].pop(WIDGET, None)
            if 'text/markdown' in o.get('data', {}):
                said = outward(''.join(o['data']['text/markdown']), path, inside)  # Sphinx resolves no links in outputs
                o['data']['text/markdown'] = re.sub(
                    r'(\]\((?![a-z]+:)[^)\s#]+)\.(?:ipynb|md)(?=[)#])', r'\1.html', said
                )
        shown = re.sub(r'(?m)^#\|.*\n?', '', text)
        cells.append(cell | dict(source=shown, metadata=cell['metadata'] | dict(tags=tags)))
    module = page_facts(path)['module']
    notes = [f'Library: [`cxrpaper.{module}`]({up(path)}api/{module}.md).'] if module else []
    if notes:
        cells.insert(1, markdown_cell('```{note}\n' + '\n'.join(notes) + '\n```', 'note'))
    kept = {k: v for k, v in nb['metadata'].items() if k not in ('widgets', NOTED)}
    return nb | dict(metadata=kept, cells=cells)


def up(path: Path) -> str:
    return '../' * len(path.relative_to(ROOT).parent.parts)


def toctree(caption: str, entries) -> str:  # paths from the root of the site, without suffix
    lines = '\n'.join(f'{title} </{e}>' if title else f'/{e}' for title, e in entries)
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n'


# ---- the library, read from its source: no import, so that an error in a module cannot hide it


def comments(text: str) -> dict:  # line -> what its comment says
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}


def table(rows) -> str:
    "Name, type, default and meaning of arguments or fields."
    escape = lambda s: s.replace('|', '\\|').replace('\n', ' ')
    code = lambda s: f'`{escape(s)}`' if s else ''
    head = ['| | type | default | |', '|:--|:--|:--|:--|']
    body = [f'| {code(n)} | {code(t)} | {code(d)} | {escape(c)} |' for n, t, d, c in rows]
    return '\n'.join(head + body) if body else ''


def written(node) -> str:
    return ast.unparse(node) if node is not None else ''


def arguments(node, said) -> list:  # of a function: (name, type, default, comment), the result last
    a = node.args
    named = a.posonlyargs + a.args
    defaults = [None] * (len(named) - len(a.defaults)) + a.defaults
    rows = [*zip(named, defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    rows += [(x, None) for x in (a.vararg, a.kwarg) if x]
    out = [(x.arg, written(x.annotation), written(d), said.get(x.lineno, '')) for x, d in rows if x.arg != 'self']
    if node.returns is not None:
        out.append(('returns', written(node.returns), '', said.get(node.returns.end_lineno, '')))
    one_line = len({x.lineno for x, _ in rows}) <= 1 and len(rows) > 1  # then the comment is the result's or of all
    return [(n, t, d, c if not one_line or n == 'returns' else '') for n, t, d, c in out]


def directive(kind: str, head: str, body: str, depth: int) -> str:
    fence = '`' * (10 - 2 * depth)
    return f'{fence}{{py:{kind}}} {head}\n\n{body.strip()}\n{fence}\n'


def signature(node) -> str:  # names and defaults; types stand in the table
    bare = ast.parse(f'def f({ast.unparse(node.args)}): ...').body[0].args
    for x in [*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg]:
        if x is not None:
            x.annotation = None
    bare.args = [x for x in bare.args if x.arg != 'self']
    return f'({ast.unparse(bare)})'


def function_doc(node, said, kind='function', name=None, depth=1) -> str:
    text = f'{ast.get_docstring(node) or ""}\n\n{table(arguments(node, said))}'
    return directive(kind, (name or node.name) + signature(node), text, depth)


def class_doc(node, said) -> str:
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    rows = [(written(n.target), written(n.annotation), written(n.value), said.get(n.end_lineno, '')) for n in fields]
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((n for n in methods if n.name == '__init__'), None)
    rows += arguments(init, said) if init else []
    offered = {n.name: n for n in reversed(methods) if not n.name.startswith('_')}  # a property once, by its getter
    shown = [function_doc(n, said, 'method', depth=2) for n in reversed(offered.values())]
    head = node.name + (signature(init) if init else '')
    return directive('class', head, '\n\n'.join([ast.get_docstring(node) or '', table(rows), *shown]), 0)


def patched(node) -> str | None:  # the class that a function is patched into
    marks = [written(d) for d in node.decorator_list]
    return written(node.args.args[0].annotation) if any(m.startswith('patch') for m in marks) else None


def members(text: str) -> list:  # (name, documentation) of what a module offers
    tree, said, out = ast.parse(text), comments(text), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (owner := patched(node)):
            name = f'{owner}.{node.name}'
            out.append((name, function_doc(node, said, 'method', name)))
        elif isinstance(node, ast.FunctionDef):
            out.append((node.name, function_doc(node, said)))
        elif isinstance(node, ast.ClassDef):
            out.append((node.name, class_doc(node, said)))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            value, name = written(node.value), node.targets[0].id
            shown = f'```python\n{value}\n```' if len(value) < 400 else ''
            out.append((name, directive('data', name, f'{said.get(node.lineno, "")}\n\n{shown}', 0)))
    return [(n, d) for n, d in out if not n.split('.')[-1].startswith('_')]


def modules():  # module -> (file, the notebook that it is exported from)
    pages = {page_facts(p)['module']: p for p in notebooks()}
    files = sorted((ROOT / 'cxrpaper').rglob('*.py'))
    name = lambda f: f.relative_to(ROOT / 'cxrpaper').with_suffix('').as_posix().replace('/', '.')
    return {name(f): (f, pages[name(f)]) for f in files if f.name not in ('__init__.py', '_modidx.py')}


def api_page(module: str, file: Path, page: Path) -> str:
    facts, docs = page_facts(page), members(file.read_text(encoding='utf-8'))
    head = f'# {module}\n\n{facts["subtitle"]} Written in [{facts["title"]}](../{page.relative_to(ROOT).as_posix()}).\n'
    return '\n'.join([head, f'```{{py:module}} cxrpaper.{module}\n```\n', *(d for _, d in docs)])


def api_index() -> str:
    rows = [f'| [`cxrpaper.{m}`]({m}.md) | {page_facts(p)["subtitle"]} |' for m, (_, p) in modules().items()]
    text = '# Library\n\nWhat each module offers, from its source: arguments, types, defaults, meaning.'
    tree = toctree('Modules', [('', f'api/{m}') for m in modules()])
    return '\n'.join([text + ' {ref}`Index of names <genindex>`.\n', '| module | |\n|:--|:--|', *rows, '', tree])


# ---- results


def results_page(study: str, folder: Path) -> str:
    "Tables, figures and reports of one study, each with what it was made from."
    about = (ROOT / 'config' / f'{study}.yaml').read_text(encoding='utf-8').splitlines()[0].lstrip('# ')
    in_order = lambda stem: sorted(folder.glob(f'{stem}*.png' if stem == 'figure' else f'{stem}*.md'), key=number)
    tables, figures = in_order('table'), in_order('figure')
    reports = sorted(p for p in folder.glob('*.md') if not p.stem.startswith('table'))
    parts = [f'# {RESULTS[study]}\n\n{about}\n\nResults of state `{state_of(folder)}`.\n\n## Tables\n']
    parts += [f'* [{table_title(p)}]({p.name})' for p in tables]
    parts += ['\n## Reports\n', *(f'* [{report_title(p)}]({p.name})' for p in reports), '\n## Figures\n']
    parts += [f'{figure_markdown(p, folder)}\n' for p in figures]
    return '\n'.join([*parts, toctree('Tables', [('', p.relative_to(ROOT).with_suffix('')) for p in tables + reports])])


def number(path: Path):
    return int(re.sub(r'\D', '', path.stem) or 0)


def caption(path: Path) -> str:
    return json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))['caption']


def table_title(path: Path) -> str:
    return re.match(r'\*\*(.+?)\.?\*\*', caption(path))[1]


def report_title(path: Path) -> str:
    return path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')


def table_page(path: Path) -> str:
    "A table, its files, and the runs that it was computed from."
    record = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    text = re.sub(r'\A\*\*[^*]+\.\*\*\s*', '', path.read_text(encoding='utf-8'))
    files = ', '.join(f'[{s}]({path.stem}.{s})' for s in ('csv', 'tex', 'json') if path.with_suffix(f'.{s}').exists())
    return (
        f'# {table_title(path)}\n\n{text}\n\nFiles: {files}. Made from {len(record["runs"])} runs, named in the json.\n'
    )


# ---- all of it


def front_toctrees(results) -> str:
    doc = lambda p: p.relative_to(ROOT).with_suffix('').as_posix()
    book = toctree('The book', [('', doc(p)) for p in BOOK[1:]])
    appendix = toctree('Appendix', [('', f'nbs/appendix/{w}/index') for w in WINGS])
    made = toctree('Tables and figures', [('', doc(d / 'index.md')) for d in results.values()])
    return '\n'.join([book, made, appendix, toctree('Library', [('Modules', 'api/index')])])


def documents() -> dict:  # path in the project, as if it lay there -> text
    "Every page of the site as Sphinx is to read it."
    results, pages = result_folders(), notebooks()
    inside = {*pages, *MEASURED, *(p for d in results.values() for p in d.glob('*.*'))}
    out = {p: staged(p, inside) for p in pages}
    out[BOOK[0]]['cells'].append(markdown_cell(front_toctrees(results), 'toctree'))
    out = {p: json.dumps(nb, indent=1) for p, nb in out.items()}
    for w in WINGS:
        wing, listed = NBS / 'appendix' / w, [p for p in pages if p.parent == NBS / 'appendix' / w]
        tree = toctree('Pages', [('', p.relative_to(ROOT).with_suffix('')) for p in listed])
        out[wing / 'index.md'] = f'# {w.capitalize()}\n\n{contents(listed, wing)}\n\n{tree}'
    out |= {ROOT / 'api' / f'{m}.md': api_page(m, *where) for m, where in modules().items()}
    out[ROOT / 'api' / 'index.md'] = api_index()
    for study, folder in results.items():
        out[folder / 'index.md'] = results_page(study, folder)
        for p in folder.glob('*.md'):
            text = table_page(p) if p.stem.startswith('table') else p.read_text(encoding='utf-8')
            out[p] = outward(text, p, inside)
    return out


def digests(texts: dict = None) -> dict:  # page -> sha256 of what Sphinx reads
    "What each page of the site is made from, as the project is now."
    name = lambda p: p.relative_to(ROOT).with_suffix('').as_posix()
    return {name(p): hashlib.sha256(t.encode()).hexdigest() for p, t in (texts or documents()).items()}


def write(out: Path) -> dict:  # page -> sha256
    "Write the sources of the site into `out`, which is made anew."
    shutil.rmtree(out, ignore_errors=True)
    texts = documents()
    for p, text in texts.items():
        target = out / p.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding='utf-8')
    for p in [*MEASURED, *(p for d in result_folders().values() for p in d.glob('*.*'))]:
        if p.suffix != '.md' and p.is_file():
            (out / p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, out / p.relative_to(ROOT))
    made = digests(texts)
    (out / 'digests.json').write_text(json.dumps(made, indent=1))
    return made


if __name__ == '__main__':
    print(f'{len(write(Path(sys.argv[1])))} pages')
