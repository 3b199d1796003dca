"The committed figures can be read where they are printed: no wider than a page, no letter too small."

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DRAWN = sorted((ROOT / 'figures').rglob('figure*.svg'))
PAGE = 7.1 * 72  # points: the width of a page of two columns
LEAST = 5.5  # points


def illegible(svg):  # letters that are too small, as points on a page that the figure fits in
    width = float(re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)[1])
    sizes = {float(s) for s in re.findall(r'font(?:-size)?: (?:[a-z]+ )*([\d.]+)px', svg)}
    return sorted(s for s in sizes if s * min(1, PAGE / width) < LEAST - 0.05), len(sizes)


@pytest.mark.parametrize('file', DRAWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_letter_can_be_read(file):
    small, n = illegible(file.read_text())
    assert small == [] and (n or file.stem == 'figure2')


def test_a_small_letter_is_found():
    svg = '<svg xmlns="x" width="{}pt" height="9pt"><text style="font-size: {}px; text-anchor: start">a</text></svg>'.format
    assert illegible(svg(500, 6)) == ([], 1)
    assert illegible(svg(500, 4)) == ([4.0], 1)
    assert illegible(svg(1000, 7)) == ([7.0], 1)  # wider than a page: all of it shrinks
