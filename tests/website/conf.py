"Sphinx's configuration for the web pages; pages.py wrote what it reads. Nothing is executed, nothing is loaded from elsewhere."

import json
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

project = 'cxrpaper'
author = copyright = 'the cxrpaper authors'
extensions = ['myst_nb', 'sphinx.ext.mathjax']
root_doc = 'nbs/index'
exclude_patterns = ['digests.json']
html_title = 'cxrpaper'
html_theme = 'sphinx_book_theme'
html_context = dict(default_mode='auto')
language = 'en'

nb_execution_mode = 'off'
nb_render_markdown_format = 'gfm'
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_code_prompt_show = 'Show code'
nb_code_prompt_hide = 'Hide code'
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 4
suppress_warnings = ['myst.header']  # a page may step from # to ###
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries = False

mathjax_package = Path(find_spec('mathjax').origin).parent / 'static' / 'mathjax' / 'es5'
mathjax_path = 'tex-svg-full.js'
mathjax3_config = dict(svg=dict(fontCache='local'), options=dict(enableMenu=False))
html_static_path = [str(Path(__file__).with_name('site.css')), str(mathjax_package / mathjax_path)]
html_css_files = ['site.css']

settings = ConfigParser(interpolation=None)
settings.read(Path(__file__).parents[2] / 'settings.ini', encoding='utf-8')
html_theme_options = dict(
    repository_url=settings['DEFAULT']['git_url'],
    repository_branch=settings['DEFAULT']['branch'],
    path_to_docs='',
    use_repository_button=True,
    use_download_button=True,
    launch_buttons=dict(
        notebook_interface='jupyterlab',
        binderhub_url='https://mybinder.org',
        colab_url='https://colab.research.google.com',
    ),
    navbar_persistent=[],  # the search stands in the sidebar
    show_navbar_depth=1,
    show_toc_level=2,
)


# what a screen reader is told: a name for each toggle, and no other name than the one that is seen
NAMES = (
    ('<summary><span class="toctree-toggle"', '<summary aria-label="Pages below"><span class="toctree-toggle"'),
    ('<summary aria-label="Toggle hidden content">', '<summary>'),
    (
        'search-button__button pst-js-only" title="Search" aria-label="Search"',
        'search-button__button pst-js-only" title="Search"',
    ),
)


def about_page(app, pagename, templatename, context, doctree):
    "Of what state of its source a page was made, and the way to it in the JupyterLab that `make lab` opens."
    digests = json.loads((Path(app.srcdir) / 'digests.json').read_text())
    context['metatags'] = context.get('metatags', '') + '<link rel="icon" href="data:,">'
    if pagename in digests:
        context['metatags'] += f'<meta name="source-digest" content="{digests[pagename]}">'
    for group in context.get('header_buttons', []):
        if group.get('label') == 'launch-buttons':
            url = f'http://localhost:8888/lab/tree/{pagename}.ipynb'
            button = dict(type='link', text='JupyterLab', tooltip='After make lab, on this computer', url=url)
            for other in group['buttons']:
                if other['text'] == 'Colab':  # which opens the page without the project
                    other['tooltip'] = 'Open in Colab: begin with the three lines that the page Running it gives'
            group['buttons'].insert(0, button | dict(icon='fas fa-laptop'))


def finish(app, exception):
    "Names for screen readers in every page, and a front page that opens the index of the book."
    if exception is None:
        for file in Path(app.outdir).rglob('*.html'):
            text = file.read_text(encoding='utf-8')
            for was, is_now in NAMES:
                text = text.replace(was, is_now)
            file.write_text(text, encoding='utf-8')
        to = f'{root_doc}.html'
        page = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"><title>{project}</title>'
        page += (
            f'<meta http-equiv="refresh" content="0; url={to}"></head><body><a href="{to}">{project}</a></body></html>'
        )
        (Path(app.outdir) / 'index.html').write_text(page)


def setup(app):
    app.connect('html-page-context', about_page, priority=900)
    app.connect('build-finished', finish)
