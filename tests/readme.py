"README.md from nbs/index.ipynb: its prose and saved outputs, without code and what is tagged index-only; links turned from nbs/ to the root."

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme_text(index=ROOT / 'nbs' / 'index.ipynb'):
    nb = nbformat.read(index, as_version=4)
    left_out = lambda c: (
        c.source.startswith(('#| hide', '#| default_exp')) or 'index-only' in c.metadata.get('tags', ())
    )
    nb.cells = [c for c in nb.cells if not left_out(c)]
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?://|\.\./|#)([^)]+\.ipynb)\)', r'](nbs/\1)', text).replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(readme_text(), encoding='utf-8')
