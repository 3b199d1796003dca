"Tables: what a mean over seeds is made of, whichever table it stands in, and the bytes that a table has without reported numbers."

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrpaper.evaluation import report
from cxrpaper.evaluation import rows as R
from cxrpaper.evaluation.masks import STEPS, MaskScores, evaluate_masks
from cxrpaper.evaluation.metrics import Resampling, point_metrics, probabilities, read_cases, simulate_predictions
from cxrpaper.paper import tables as T
from cxrpaper.schema import CLASSES

SEEDS = [5, 0, 11]


def frames_of(row, seeds, n=60):  # the same patients, other logits with each seed
    base = simulate_predictions(n, separation=0.5 + len(str(row)) % 5 / 4)
    logits = [c for c in base if c.startswith('logit_')]
    return [
        base.assign(
            **dict(
                zip(
                    logits, (base[logits] + np.random.default_rng(s).normal(size=(len(base), len(logits)))).to_numpy().T
                )
            )
        )
        for s in seeds
    ]


@pytest.fixture
def study(monkeypatch):
    "A study with three seeds, its runs replaced by simulated predictions."
    rows = [
        dict(arch='a', pretrain='none'),
        dict(arch='a', pretrain='imagenet'),
        dict(arch='a', pretrain='imagenet', multitask=True),
    ]
    for m in (T, R):
        if hasattr(m, 'row_frames'):
            monkeypatch.setattr(m, 'row_frames', lambda s, row: frames_of(row, s['seeds']))
    monkeypatch.setattr(T, 'label_frames', lambda s, row, f: frames_of((row, f), s['table6']['draws']))
    monkeypatch.setattr(T, 'baseline_frame', lambda s, kind: frames_of(kind, [0])[0])
    monkeypatch.setattr(T, 'load_run', lambda r: dict(n_params=1e6, macs=1e9, n=dict(train=100)))
    monkeypatch.setattr(T, 'mask_runs', lambda s, row, name='segmentation': masks_of(s['seeds']))
    base = dict(
        name='made-up',
        profile='smoke',
        data_root=None,
        adapter='auto',
        px=96,
        n_folds=5,
        folds=[0],
        seeds=SEEDS,
        finetune={},
    )
    return base | dict(
        table2=rows[:2], table3=rows[1:], table4=rows, table6=dict(rows=rows[:2], fractions=[0.1, 1.0], draws=[3, 4])
    )


def masks_of(seeds, n=40):  # one fold per seed: the same images and truth, other predictions
    g = np.random.default_rng(0)
    label = g.integers(1, 4, n)
    true = g.integers(20, 60, n)
    ids = [f'i{k:03}' for k in range(n)]
    images = pd.DataFrame(
        dict(
            image=ids,
            study=ids,
            patient=ids,
            group=ids,
            fold=0,
            split=np.where(np.arange(n) < n // 2, 'val', 'test'),
            label=label,
        )
    )

    def one(s):
        g = np.random.default_rng(s)
        at = lambda m, mean: np.array(
            [np.bincount(g.binomial(STEPS - 1, mean, k), minlength=STEPS) for k in m], np.uint32
        )
        inside = at(true, 0.6 + s / 100)
        return MaskScores(images, inside, at(np.full(n, 400), 0.4), inside, np.arange(n))

    return [[one(s)] for s in seeds]


def check(long, frames, names):
    "Each line's seeds are the point metrics of that seed alone, and their mean is its value."
    seeds = long.set_index('metric').seeds.map(R.read_seeds)
    for s, f in zip(names, frames, strict=True):
        p = point_metrics(f.label.values, probabilities(f))
        assert set(p) < set(seeds.index)
        assert {m: seeds[m][s] for m in p} == p
        c = read_cases(f)
        assert seeds['study_map'][s] == c.samples(np.ones((c.n_units, 1)))['study_map'][0]
        assert np.isclose(
            seeds['auc_macro'][s],
            np.mean([roc_auc_score(f.label == k, probabilities(f)[:, k]) for k in range(len(CLASSES))]),
            rtol=1e-12,
        )
    assert all(list(v) == list(names) for v in seeds)
    np.testing.assert_allclose(seeds.map(lambda v: np.mean(list(v.values()))), long.value, rtol=1e-12)
    np.testing.assert_allclose(seeds.map(lambda v: np.std(list(v.values()), ddof=1)), long.sd_seeds, rtol=1e-9)


def test_table2_keeps_every_seed(study):
    long, _, _ = T.backbone_table(study, Resampling(100))
    for row in study['table2']:
        check(long[long.row == f"{row['arch']}, {row['pretrain']}"], frames_of(row, SEEDS), SEEDS)
    baselines = long[long.row.str.startswith('metadata baseline')]
    assert len(baselines) and (baselines.seeds == '').all()  # they have none


def test_tables_3_to_5_keep_every_seed(study):
    frames, long = R.evaluated(study, {'x': study['table4'][1], 'y': study['table4'][0]}, Resampling(100))
    for k in frames:
        check(long[long.row == k], frames[k], SEEDS)


def test_table6_keeps_every_draw(study):
    long, frames = T.label_evaluations(study, Resampling(100))
    for (k, f), v in frames.items():
        check(long[(long.row == k) & (long.labels == f)], v, study['table6']['draws'])


def test_masks_keep_every_seed(study):
    _, _, masks, _ = T.multitask_table(study, Resampling(100))
    own = masks[(masks.row == 'multi-task') & ~masks.metric.str.startswith('study_')].set_index('metric')
    for s, runs in zip(SEEDS, masks_of(SEEDS)):
        alone = evaluate_masks([runs], Resampling(100)).set_index('metric').value
        assert len(alone) == len(own)
        np.testing.assert_array_equal(
            own.seeds.map(lambda t: R.read_seeds(t)[s]), alone[own.index]
        )  # NaN where there is none
    np.testing.assert_allclose(own.seeds.map(lambda t: np.mean(list(R.read_seeds(t).values()))), own.value, rtol=1e-12)
    assert own.seeds['dice'] != masks[(masks.row == 'box prior')].set_index('metric').seeds['dice']
    assert list(R.read_seeds(masks[masks.row == 'box prior'].seeds.iloc[0])) == SEEDS[:1]


def test_other_seeds_are_noticed(study):
    "The counter-test: two seeds exchanged, or one too few."
    frames = frames_of('x', SEEDS)
    with pytest.raises(AssertionError):
        check(R.evaluate_seeds(frames[::-1], SEEDS, Resampling(100)), frames, SEEDS)
    with pytest.raises(ValueError):
        R.evaluate_seeds(frames, SEEDS[:2], Resampling(100))


def test_csv_keeps_all_digits(tmp_path):
    f = frames_of('x', SEEDS)
    long = R.evaluate_seeds(f, SEEDS, Resampling(100)).assign(row='x')
    report.write_table('t', long, [report.wide(long, report.BY_CLASS)], 'c', [], tmp_path)
    back = pd.read_csv(tmp_path / 't.csv')
    for s, d in zip(SEEDS, f):
        p = point_metrics(d.label.values, probabilities(d))
        assert {m: R.read_seeds(back.set_index('metric').seeds[m])[s] for m in p} == p
