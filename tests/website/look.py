"""Look at the web pages as a reader's browser does: .site/env/bin/python tests/website/look.py _docs [pages ...] [--axe].

Each page is opened in headless Chromium at three widths. Said are: errors of the console, requests that leave the machine, pages
wider than the screen, formulas that were not set, pictures that were not shown; with --axe also what axe-core calls serious, in
the light and in the dark. The environment is the site's (requirements.in), the browser the system's (Debian: chromium).
"""

import argparse
import functools
import http.server
import shutil
import threading
from pathlib import Path

WIDTHS = (1280, 760, 360)
WIDER = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
UNSET = """() => [
  ...[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container svg')).map(e => 'not set: ' + e.textContent.slice(0, 60)),
  ...[...document.querySelectorAll('[data-mml-node="merror"], mjx-merror')].map(e => 'no TeX: ' + e.textContent.slice(0, 60)),
  ...[...document.querySelectorAll('article img')].filter(e => e.loading != 'lazy' && !(e.complete && e.naturalWidth)).map(e => 'no picture: ' + e.src)]"""


def serve(folder: Path):  # -> the server; its port is in server_address
    "The site at an address of its own, as a web server gives it."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # the browser went to another page

    server = Server(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def browser_of(playwright):
    "Chromium that asks nobody anything by itself."
    quiet = 'no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update'
    args = [f'--{a}' for a in (quiet + ' disable-sync').split()]
    return playwright.chromium.launch(executable_path=shutil.which('chromium'), args=args)


def watch(page, address: str) -> list:  # fills as the page is used
    "What a page says to the console as an error, and what it asks of other machines."
    seen = []
    page.on('console', lambda m: seen.append(f'console: {m.text}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: seen.append(f'error: {e}'))
    page.on('response', lambda r: seen.append(f'not there: {r.url}') if r.status >= 400 else None)
    page.on('requestfailed', lambda r: seen.append(f'failed: {r.url}'))
    own = (address, 'data:', 'blob:', 'about:')
    page.on('request', lambda r: seen.append(f'leaves the machine: {r.url}') if not r.url.startswith(own) else None)
    return seen


def look(page, address: str, name: str, seen: list, axe=None) -> list:  # what is wrong with a page
    "Open one page, wait for its formulas, make it narrow and dark, and say what is wrong."
    del seen[:]
    page.set_viewport_size(dict(width=WIDTHS[0], height=900))
    page.goto(f'{address}/{name}', wait_until='load')
    page.wait_for_function('!window.MathJax || !MathJax.startup || MathJax.startup.promise')
    page.evaluate('() => window.MathJax && MathJax.startup && MathJax.startup.promise')
    wrong = page.evaluate(UNSET)
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        if (wider := page.evaluate(WIDER)) > 0:
            wrong.append(f'{wider} pixels wider than a screen of {width}')
    page.set_viewport_size(dict(width=WIDTHS[0], height=900))
    page.add_style_tag(content='* { transition: none !important }')  # colours are judged as they come to rest
    for theme in ('light', 'dark') if axe else ():
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        said = axe.run(page, options=dict(preload=False)).response  # else it asks for style sheets at wrong addresses
        found = [v for v in said['violations'] if v['impact'] in ('serious', 'critical')]
        wrong += [f'axe, {theme}: {v["id"]}: {" ".join(map(str, n["target"]))}' for v in found for n in v['nodes']]
    return [f'{name}: {w}' for w in [*seen, *wrong]]


def look_at(site: Path, names, axe: bool = False) -> list:
    "What is wrong with these pages of a site."
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    server = serve(site)
    address = f'http://127.0.0.1:{server.server_address[1]}'
    with sync_playwright() as playwright:
        browser = browser_of(playwright)
        page = browser.new_page()
        seen = watch(page, address)
        wrong = [w for n in names for w in look(page, address, n, seen, Axe() if axe else None)]
        browser.close()
    server.shutdown()
    return wrong


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('site', type=Path)
    parser.add_argument('pages', nargs='*')
    parser.add_argument('--axe', action='store_true', help='what axe-core finds: takes five times as long')
    a = parser.parse_args()
    pages = a.pages or sorted(
        p.relative_to(a.site).as_posix() for p in a.site.rglob('*.html') if '_static' not in p.parts
    )
    faults = look_at(a.site, pages, a.axe)
    print('\n'.join(faults) or f'{len(pages)} pages: nothing is wrong')
    raise SystemExit(bool(faults))
