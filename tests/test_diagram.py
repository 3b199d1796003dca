"Figure 1: what stands in it is true of the study, nothing overlaps, arrows meet boxes."

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from cxrpaper.data.cohort import make_cohort
from cxrpaper.evaluation.report import write_figure
from cxrpaper.models.nets import Encoder
from cxrpaper.paper import diagram as D
from cxrpaper.runs import InputError
from cxrpaper.schema import CLASSES
from cxrpaper.study import all_rows, grid, read_study, run_name

LARGE = dict(
    name='a corpus of a long name',
    read=6334,
    images=6117,
    studies=6054,
    patients=3261,
    boxes=7853,
    boxed=4294,
    by_class=[1736, 2855, 1049, 477],
    digest='',
)
SMALL = dict(name='x', read=1, images=1, studies=1, patients=1, boxes=1, boxed=1, by_class=[0, 1, 0, 0], digest='')
STUDIES = ('smoke', 'phantom', 'study')


@pytest.fixture(scope='module', params=STUDIES)
def study(request):
    s = read_study(f'config/{request.param}.yaml')
    return s, D.run_facts(s), D.model_facts(s)


def texts(fig):
    return [t for ax in fig.axes for t in ax.texts]


def faults(fig) -> list:
    "Texts that overlap each other or leave their box or the figure; arrows that end nowhere."
    with mpl.rc_context(D.STYLE):
        fig.draw_without_rendering()
    r = FigureCanvasAgg(fig).get_renderer()
    seen = [(t, t.get_window_extent(r)) for t in texts(fig)]
    found = []
    for i, (t, a) in enumerate(seen):
        found += [
            f'{t.get_text()!r} overlaps {o.get_text()!r}'
            for o, b in seen[i + 1 :]
            if a.overlaps(b) and min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5
        ]
        if not (
            fig.bbox.x0 - 1 <= a.x0 and a.x1 <= fig.bbox.x1 + 1 and fig.bbox.y0 - 1 <= a.y0 and a.y1 <= fig.bbox.y1 + 1
        ):
            found.append(f'{t.get_text()!r} leaves the figure')
    for ax in fig.axes:
        boxes = [
            p for p in ax.patches if isinstance(p, (FancyBboxPatch, Rectangle)) and not isinstance(p, FancyArrowPatch)
        ]
        corners = [(p, p.get_window_extent(r)) for p in boxes]
        scale = fig.dpi
        for t, b in seen:
            if t.axes is not ax:
                continue
            x, y = (b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2
            for p, c in corners:
                if (
                    p.get_facecolor()[3]
                    and c.x0 < x < c.x1
                    and c.y0 < y < c.y1
                    and not (c.x0 <= b.x0 and b.x1 <= c.x1 and c.y0 <= b.y0 and b.y1 <= c.y1)
                ):
                    found.append(f'{t.get_text()!r} leaves its box')
        for a in ax.patches:
            if not isinstance(a, FancyArrowPatch):
                continue
            x, y = ax.transData.transform(a._posA_posB[1])
            at = lambda c: (
                min(abs(x - c.x0), abs(x - c.x1)) < 0.02 * scale
                and c.y0 - 2 <= y <= c.y1 + 2
                or min(abs(y - c.y0), abs(y - c.y1)) < 0.02 * scale
                and c.x0 - 2 <= x <= c.x1 + 2
            )
            if not any(at(c) for _, c in corners):
                found.append(f'an arrow ends at {a._posA_posB[1]}')
    return found


@pytest.mark.parametrize('columns', (1, 2))
@pytest.mark.parametrize('cohort', (LARGE, SMALL), ids=('large', 'small'))
def test_nothing_overlaps_and_arrows_meet_boxes(study, cohort, columns):
    s, runs, models = study
    fig = D.figure_diagram(cohort, runs, models, s, columns)
    assert faults(fig) == []
    assert min(t.get_fontsize() for t in texts(fig)) >= 5.5  # points, at the printed width
    assert fig.get_size_inches()[0] == pytest.approx(7.0 if columns == 2 else 3.4)


def test_faults_are_found(study):
    "The counter-test: a number too long for its box, and an arrow into the void."
    s, runs, models = study
    assert 'leaves its box' in ' '.join(
        faults(
            D.figure_diagram(LARGE | dict(name='a name that no box of this figure could ever hold'), runs, models, s)
        )
    )
    fig = D.figure_diagram(LARGE, runs, models, s)
    with mpl.rc_context(D.STYLE):
        D.draw_arrow(fig.axes[0], (1.0, 4.9), (3.0, 4.95))
    assert [f for f in faults(fig) if f.startswith('an arrow')]


def test_counts_are_the_studys(study):
    s, runs, _ = study
    assert runs['models'] + runs['labels'] == len(grid(s))
    t = s['table6']
    assert runs['labels'] == len(t['rows']) * sum(f < 1 for f in t['fractions']) * len(s['folds']) * len(t['draws'])
    more = D.run_facts(s | dict(seeds=[*s['seeds'], 99]))
    repeated = len({run_name(r) for r in all_rows(s | dict(table6=None))})  # the rows of Table 6 have draws instead
    assert more['models'] == runs['models'] + repeated * len(s['folds']) and more['labels'] == runs['labels']
    written = ' '.join(
        t.get_text() for t in texts(D.figure_diagram(LARGE, more, study[2], s | dict(seeds=[*s['seeds'], 99])))
    )
    assert f"{more['models']:,} runs" in written and '3,261 patients' in written and f"{s['px']} × {s['px']}" in written


def test_shapes_are_the_models(study):
    s, _, m = study
    encoder = Encoder(m['arch'])
    assert [c for c, _ in m['maps']] == encoder.channels and [side for _, side in m['maps']] == [
        s['px'] // r for r in encoder.reductions
    ]
    assert m['single'] == sum(p.numel() for p in encoder.parameters()) + (encoder.channels[-1] + 1) * len(CLASSES)
    written = [t.get_text() for t in texts(D.figure_diagram(LARGE, study[1], m, s))]
    for c, side in [*m['maps'], *m['blocks']]:
        assert f'{c}\n{side}²' in written


def test_another_model_changes_the_figure():
    s = read_study('config/phantom.yaml')
    other = s | dict(
        px=64, table3=[dict(arch='resnet10t', pretrain='none'), dict(arch='resnet10t', pretrain='none', multitask=True)]
    )
    a, b = D.model_facts(s), D.model_facts(other)
    assert (
        a['maps'] != b['maps'] and a['multi'] != b['multi'] and b['arch'] == 'resnet10t' and b['blocks'][-1] == (1, 64)
    )
    none = other | dict(table2=[], table4=[], table6=None, readiness=None, pretraining=None)
    fig = D.figure_diagram(SMALL, D.run_facts(none), b, none)
    assert faults(fig) == [] and not any('MoCo' in t.get_text() for t in texts(fig))
    with pytest.raises(InputError, match='deeplabv3plus'):
        D.model_facts(other | dict(table3=[other['table3'][0], other['table3'][1] | dict(decoder='deeplabv3plus')]))


def test_encoders_without_a_map_at_one_half():
    s = read_study('config/phantom.yaml')
    row = dict(arch='convnext_atto', pretrain='none')
    s = s | dict(table2=[row], table3=[row, row | dict(multitask=True)], table4=[], table6=None, readiness=None)
    m = D.model_facts(s)
    assert len(m['maps']) == 4
    assert faults(D.figure_diagram(SMALL, D.run_facts(s), m, s)) == []


def test_same_bytes_twice(study, tmp_path):
    s, runs, models = study
    for k in 'ab':
        write_figure('figure1', D.figure_diagram(LARGE, runs, models, s), 'c', [], tmp_path / k)
    for e in ('svg', 'png'):
        assert (tmp_path / 'a' / f'figure1.{e}').read_bytes() == (tmp_path / 'b' / f'figure1.{e}').read_bytes()


def test_cohort_facts_are_counts_of_its_rows(tmp_path, monkeypatch):
    t = pd.DataFrame(
        dict(
            image=list('abcd'),
            patient=['p', 'p', 'q', 'r'],
            study=['s', 's', 't', 'u'],
            label=[0, 0, 1, 3],
            boxes=[[], [], [(1.0, 1.0, 5.0, 5.0), (2.0, 2.0, 5.0, 5.0)], []],
        )
    )
    made = make_cohort(t, tmp_path, "made up")
    monkeypatch.setattr(D, 'load_cohort', lambda folder: made)
    c = D.cohort_facts(dict(name='x'))
    assert (c['images'], c['patients'], c['studies'], c['boxes'], c['boxed'], c['by_class']) == (
        4,
        3,
        3,
        2,
        1,
        [2, 1, 0, 1],
    )
