"The nbdev contract: clean notebooks, export equal to the library, one tagged parameters cell that survives cleaning, README equal to the index."

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme import readme_text

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(f for f in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
# a wing imports lower ones only; those of one number do not import each other
WINGS = dict(
    schema=0, runs=0, warm=1, jobs=1, study=1, data=1, models=1, evaluation=2, training=3, questions=4, paper=5
)
MODULES = sorted(
    f.relative_to(ROOT / 'cxrpaper').with_suffix('').as_posix().replace('/', '.')
    for f in (ROOT / 'cxrpaper').rglob('*.py')
    if f.name not in ('__init__.py', '_modidx.py')
)
ids = lambda o: Path(o).relative_to(NBS).as_posix() if isinstance(o, Path) else o


def cells(nb, kind='code'):
    return [c for c in nb['cells'] if c['cell_type'] == kind]


def source(c):
    return ''.join(c['source'])


def tagged(nb):
    return [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]


RUNNABLE = [
    f
    for f in NOTEBOOKS
    if re.search(r'\bparameters\(\s*globals\(\)', ''.join(map(source, cells(json.loads(f.read_text())))))
]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks and settings in a folder of their own, cleaned and exported there."
    d = tmp_path_factory.mktemp('contract')
    shutil.copytree(ROOT / 'nbs', d / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (d / 'cxrpaper').mkdir()
    for f in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / f, d / f)
    for f in (ROOT / 'cxrpaper').rglob('__init__.py'):  # no notebook writes these
        (d / f.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(f, d / f.relative_to(ROOT))
    for tool in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([BIN / tool], cwd=d, check=True, capture_output=True)
    return d


def test_notebooks_are_clean(copy):
    dirty = [ids(f) for f in NOTEBOOKS if (copy / 'nbs' / ids(f)).read_bytes() != f.read_bytes()]
    assert not dirty, f'run nbdev_clean: {dirty}'


def test_export_equals_the_library(copy):
    made, have = (
        {f.relative_to(d).as_posix(): f.read_text() for f in (d / 'cxrpaper').rglob('*.py')} for d in (copy, ROOT)
    )
    assert set(made) == set(have)
    assert not [k for k in made if made[k] != have[k]], 'run nbdev_export'


def test_a_changed_cell_is_noticed(copy, tmp_path):
    d = tmp_path / 'changed'
    shutil.copytree(copy, d)
    f = d / 'nbs' / 'appendix' / 'machine' / 'runs.ipynb'
    nb = json.loads(f.read_text())
    cell = next(c for c in cells(nb) if source(c).startswith('#| export\nclass InputError'))
    cell['source'] = source(cell) + '\n# changed'
    f.write_text(json.dumps(nb))
    subprocess.run([BIN / 'nbdev_export'], cwd=d, check=True, capture_output=True)
    assert (d / 'cxrpaper' / 'runs.py').read_text() != (ROOT / 'cxrpaper' / 'runs.py').read_text()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_notebook(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec'] == {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    text = path.read_text()
    assert not re.search(r'(?<![\w.])/(work|root|home|tmp|Users)/', text), 'a path of one machine stands in it'
    assert path.stat().st_size < 1_500_000
    first = source(cells(nb, 'markdown')[0])
    assert re.match(r'# .+\n\n?> .+', first), 'a notebook starts with a title and a one-line subtitle'
    for c in cells(nb):
        assert not [o for o in c['outputs'] if o.get('output_type') == 'error'], (
            f'an error is saved below {source(c)[:60]}'
        )


@pytest.mark.parametrize('path', RUNNABLE, ids=ids)
def test_runnable_notebook_has_one_parameters_cell(path, copy):
    "Exactly one, still tagged after nbdev_clean; all scalars with their types, profile first; one call checks just these names."
    nb = json.loads((copy / 'nbs' / ids(path)).read_text())
    (cell,) = tagged(nb)
    body = ast.parse(source(cell)).body
    assert all(isinstance(s, ast.AnnAssign) and isinstance(s.value, (ast.Constant, ast.UnaryOp)) for s in body)
    names = [s.target.id for s in body]
    assert names[0] == 'profile' and ast.literal_eval(body[0].value) == 'smoke'
    calls = [
        n
        for c in cells(nb)
        for n in ast.walk(ast.parse(re.sub(r'(?m)^[%!].*$', '', source(c))))
        if isinstance(n, ast.Call)
        and getattr(n.func, 'id', '') == 'parameters'
        and n.args
        and isinstance(n.args[0], ast.Call)
        and getattr(n.args[0].func, 'id', '') == 'globals'
    ]
    assert len(calls) == 1, 'one call of parameters(globals(), ...)'
    assert {k.arg for k in calls[0].keywords} - {'defaults'} == set(names)


def test_other_notebooks_have_no_parameters_cell():
    for f in NOTEBOOKS:
        if f not in RUNNABLE:
            assert not tagged(json.loads(f.read_text())), ids(f)


def test_without_the_setting_the_tag_is_lost(tmp_path):
    "The counter-test: drop allowed_cell_metadata_keys, and nbdev_clean removes the tag that papermill needs."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'cxrpaper').mkdir()
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / 'settings.ini')
    assert settings['DEFAULT'].pop('allowed_cell_metadata_keys') == 'tags jupyter'
    with open(tmp_path / 'settings.ini', 'w') as f:
        settings.write(f)
    shutil.copy(RUNNABLE[0], tmp_path / 'nbs')
    subprocess.run([BIN / 'nbdev_clean'], cwd=tmp_path, check=True, capture_output=True)
    assert not tagged(json.loads((tmp_path / 'nbs' / RUNNABLE[0].name).read_text()))


def test_readme_is_what_the_index_gives():
    assert (ROOT / 'README.md').read_text() == readme_text(), 'run `make readme`'


def test_papermill_tells_the_types():
    "`papermill --help-notebook`: what a person reads before the first run."
    said = subprocess.run(
        [BIN / 'papermill', '--help-notebook', NBS / '04_finetune.ipynb'], capture_output=True, text=True, check=True
    ).stdout
    assert 'px: int' in said and 'multitask: bool' in said and 'lr: float' in said and 'Unknown type' not in said


def wing(module):
    return module.split('.')[0]


def imported(module, file):
    "The modules of this package that a file imports anywhere, relatively or not; as the digests see them."
    from cxrpaper.runs import _package_imports

    return {m for m, _ in _package_imports(ast.walk(ast.parse(file.read_text())), module).values()} - {module}


def faults(imports):
    "What is wrong with {module: modules that it imports}: higher wings, wings of the same height, circles."
    wrong = []
    for m, others in imports.items():
        for o in others:
            if wing(o) != wing(m) and WINGS[wing(o)] >= WINGS[wing(m)]:
                wrong.append(f'{m} imports {o}')
    todo = dict(imports)
    while free := [m for m, others in todo.items() if not others & set(todo)]:
        for m in free:
            del todo[m]
    return wrong + ([f'a circle among {", ".join(sorted(todo))}'] if todo else [])


def test_a_wing_imports_lower_wings_only():
    assert {wing(m) for m in MODULES} == set(WINGS)
    seen = {m: imported(m, ROOT / 'cxrpaper' / f'{m.replace(".", "/")}.py') for m in MODULES}
    assert seen['training.finetune'] >= {'models.nets', 'training.loop', 'runs'}, 'the reader of imports sees them'
    assert faults(seen) == []


@pytest.mark.parametrize(
    'line,what',
    [
        ('from ..paper.tables import cell', 'data.store imports paper.tables'),
        ('from cxrpaper.models import nets', 'data.store imports models.nets'),
        ('def f():\n    from .folds import assign_folds', 'a circle among data.folds, data.store'),
    ],
)
def test_a_wrong_import_is_found(line, what, tmp_path):
    (f := tmp_path / 'store.py').write_text(line)
    assert what in faults(
        {'data.store': imported('data.store', f), 'data.folds': {'data.store'}, 'paper.tables': set()}
    )


def test_laid_out_and_checked_by_ruff():
    for ask in (['format', '--check'], ['check']):
        r = subprocess.run([BIN / 'ruff', *ask, 'nbs', 'tests'], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-1000:]


def wide_functions(files, most=7):  # -> module:function of more parameters
    out = []
    for f in files:
        for n in ast.walk(ast.parse(f.read_text())):
            if isinstance(n, ast.FunctionDef):
                named = [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs]
                if len([a for a in named if a.arg not in ('self', 'cls')]) > most:
                    out.append(f'{f.stem}:{n.name}')
    return out


def test_no_function_takes_more_than_seven_parameters(tmp_path):
    assert wide_functions((ROOT / 'cxrpaper').rglob('*.py')) == []
    (tmp_path / 'wide.py').write_text('def f(a, b, c, d, e, f, g, *, h=1): ...\n')
    assert wide_functions(tmp_path.glob('*.py')) == ['wide:f']


def exported(nb):  # sources of the exported cells, and of the others
    code = [source(c) for c in cells(nb)]
    own = [s for s in code if s.startswith('#| export')]
    return own, [re.sub(r'(?m)^\s*[%!].*$', '', s) for s in code if not s.startswith('#| export')]


def lines_of_code(cell):  # without signatures, docstrings, imports and comments; a table of data counts as one
    tree, skip = ast.parse(cell), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skip |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            skip |= set(range(node.lineno + 1, first.end_lineno + 1 if is_text else first.lineno))
    for node in tree.body:
        if isinstance(node, ast.Assign) and not any(isinstance(n, ast.Lambda) for n in ast.walk(node)):
            skip |= set(range(node.lineno + 1, node.end_lineno + 1))
    code = (i for i, line in enumerate(cell.splitlines(), 1) if line.strip() and not line.strip().startswith('#'))
    return len(set(code) - skip)


def names(tree):
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }


def never_shown(
    own, others, known=()
):  # definitions of exported cells that nothing else uses, not even through one another
    uses, defined = {}, []
    for node in (n for s in own for n in ast.parse(s).body):
        if isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list):
            uses.setdefault(ast.unparse(node.args.args[0].annotation), set()).update(names(node))  # a method
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            uses.setdefault(node.name, set()).update(names(node))
            defined.append(node.name)
        elif isinstance(node, ast.Assign):
            for name in (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                uses.setdefault(name, set()).update(names(node))
    seen = set(known).union(*(names(ast.parse(s)) for s in others))
    todo = list(seen)
    while todo:
        new = uses.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return [d for d in defined if d not in seen]


def test_exported_cells_are_short():
    pages = {p.relative_to(NBS): exported(json.loads(p.read_text()))[0] for p in NOTEBOOKS}
    assert not [(str(p), s.splitlines()[1]) for p, own in pages.items() for s in own if lines_of_code(s) > 25]
    assert lines_of_code('def f(\n    x,\n):\n    "Text."\n' + '    x += 1\n' * 30) == 31
    assert lines_of_code('T = [\n' + '    1,\n' * 30 + ']') == 1


def test_everything_exported_is_shown_or_tested():
    "By an example of its own page, by a page of the book or the library behind it, by a test, or as a console script."
    from cxrpaper.runs import notebook_of, page_of

    pages = {p: exported(json.loads(p.read_text())) for p in NOTEBOOKS}
    behind = {notebook_of(m) for m in MODULES if page_of(m).parent == NBS}
    shows = [s for p, both in pages.items() if p.stem[:2].isdigit() or p in behind for part in both for s in part]
    shows += [p.read_text() for p in ROOT.glob('tests/*.py') if p.name != 'test_contract.py']
    known = set().union(*(names(ast.parse(s)) for s in shows))
    known |= set(re.findall(r':(\w+)', ''.join((ROOT / f).read_text() for f in ('settings.ini', 'setup.py'))))
    hidden = {ids(p): never_shown(own, others, known) for p, (own, others) in pages.items()}
    assert not {k: v for k, v in hidden.items() if v}
    assert never_shown(['def f():\n    g()', 'def g():\n    0', 'def h():\n    0'], ['f()']) == ['h']


def test_every_promise_names_a_test_that_is_there():
    "tests/README.md: each test it names exists, and each file of tests is named by a promise or tests a page's own numbers."
    named = re.findall(r'\| (test_\w+)\.py::(test_\w+) \|', (ROOT / 'tests' / 'README.md').read_text())
    assert len(named) > 40
    there = {
        (f.stem, n)
        for f in (ROOT / 'tests').glob('test_*.py')
        for n in re.findall(r'(?m)^def (test_\w+)', f.read_text())
    }
    assert not set(named) - there, sorted(set(named) - there)
