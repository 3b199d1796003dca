"Generated sentences say what their numbers say: each of the five words where it is right, and no other."

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrpaper.evaluation.metrics import Verdict
from cxrpaper.evaluation.plan import Plan
from cxrpaper.paper.answers import (
    EVIDENCE,
    Evidence,
    answers_markdown,
    at_chance,
    fewer_labels,
    masks_learnt,
    most_frequent,
    one_answer,
    restoration_answers,
    short_answers,
    why_hard,
)
from cxrpaper.paper.tables import multitask_verdict, pretraining_verdict
from cxrpaper.questions.readiness import overall
from cxrpaper.questions.subgroups import gap_verdict

ROOT = Path(__file__).resolve().parent.parent
PLAN = Plan(
    metric='auc_macro', alpha=0.05, margin=0.02, runs=5, pretrainings=3, questions=dict(multitask=0.5, pretraining=0.5)
)
WORDS = [str(v) for v in Verdict]
CASES = dict(
    better=dict(value=0.05, se=0.01, p_adjusted=0.001, lo=0.03, hi=0.07),
    worse=dict(value=-0.05, se=0.01, p_adjusted=0.001, lo=-0.07, hi=-0.03),
    equivalent=dict(value=0.001, se=0.004, p_adjusted=0.8, lo=-0.007, hi=0.009),
    inconclusive=dict(value=0.01, se=0.02, p_adjusted=0.6, lo=-0.03, hi=0.05),
    undefined=dict(value=np.nan, se=np.nan, p_adjusted=np.nan, lo=np.nan, hi=np.nan),
)
ROW = dict(metric='auc_macro', df=400.0, n_runs=5, n_pretrainings=3, n_units=500)


def words_in(text):
    return [w for w in WORDS if re.search(rf'\b{w}\b', text)]


def masks(case, control=None):  # differences of Table 3
    than = ['single-task', 'multi-task, presence masks', 'multi-task, shuffled masks']
    return pd.DataFrame(
        [dict(ROW, row='multi-task', than=k, **CASES[case if i == 0 else control or case]) for i, k in enumerate(than)]
    )


@pytest.mark.parametrize('word', CASES)
def test_one_word_and_no_other(word):
    row = dict(ROW, row='MoCo, single-task', than='ImageNet, single-task', question='ImageNet', **CASES[word])
    assert words_in(one_answer(pd.Series(row), PLAN, 0.025)) == [word]
    assert words_in(pretraining_verdict(pd.DataFrame([row]), PLAN, 0.025)) == [word]
    assert words_in(multitask_verdict(masks(word), PLAN).split(';')[0]) == [word]
    hole = dict(method='network', other='mean', value=0.1, of_other=0.1, n=60, n_units=30)
    hole |= dict(difference=-row['value'], lo=-row['hi'], hi=-row['lo'])
    of_holes = words_in(restoration_answers(pd.DataFrame([hole])))  # of an error, less is better; it has no margin
    assert of_holes == ['inconclusive' if word == 'equivalent' else word]


@pytest.mark.parametrize('word', ('better', 'worse'))
def test_too_few_runs_make_no_claim(word):
    few = pd.Series(dict(ROW, row='multi-task', than='single-task', **CASES[word]) | dict(n_runs=4))
    assert words_in(one_answer(few, PLAN, 0.025)) == [] and 'no claim' in one_answer(few, PLAN, 0.025)
    assert words_in(multitask_verdict(masks(word).assign(n_runs=4), PLAN)) == []


def test_the_place_is_named_only_where_the_controls_lose():
    named = 'by the place of the opacities'
    assert named in multitask_verdict(masks('better'), PLAN)
    for control in ('worse', 'equivalent', 'inconclusive', 'undefined'):
        text = multitask_verdict(masks('better', control), PLAN)
        assert named not in text and 'is not shown' in text
    for word in ('worse', 'equivalent', 'inconclusive', 'undefined'):
        assert 'place' not in multitask_verdict(masks(word, 'better'), PLAN)


def test_an_interval_without_zero_is_no_claim_by_itself():
    row = dict(ROW, row='multi-task', than='single-task', value=0.027, se=0.011, p_adjusted=0.035, lo=0.005, hi=0.049)
    assert one_answer(pd.Series(row), PLAN, 0.025).startswith('inconclusive (p 0.035, a claim takes 0.025); ')
    assert one_answer(pd.Series(row), PLAN, 0.05).startswith('better; ')


@pytest.mark.parametrize('word', CASES)
def test_the_first_page_says_the_word_of_its_table(word, tmp_path):
    "From a table to the sentence in README.md, on real radiographs and on planted phantoms."
    row = dict(ROW, row='multi-task', than='single-task', question='more tasks', **CASES[word])
    pd.DataFrame([row | dict(metric='difference_auc_macro')]).to_csv(tmp_path / 'table3.csv', index=False)
    real, planted = (Evidence('a study', str(tmp_path), kind, 'of a kind') for kind in ('real', 'planted'))
    for text in (short_answers((real, planted), PLAN), answers_markdown((real,), PLAN)):
        assert words_in(text.replace('*', '')) == [word], text
    assert not re.search(r'prove|because|cause|due to|helps[ .,;]', short_answers((real, planted), PLAN))


@pytest.mark.parametrize('word', CASES)
def test_what_was_planted_stands_beside_what_was_found(word, tmp_path):
    "A gain that should be there and is not found is said; where none should be there, nothing is missed."
    row = dict(ROW, row='multi-task', than='single-task', question='more tasks', **CASES[word])
    control = dict(ROW, row='multi-task, shuffled masks', than='single-task', question='more tasks', **CASES['better'])
    place = [dict(row, than=f'multi-task, {m} masks', question='place') for m in ('presence', 'shuffled')]
    t = pd.DataFrame([k | dict(metric='difference_auc_macro') for k in (row, control, *place)])
    t.to_csv(tmp_path / 'table3.csv', index=False)
    for expected in ('better', 'no gain by place'):
        said = short_answers((Evidence('a study', str(tmp_path), 'planted', 'of a kind', expected),), PLAN)
        if expected == 'better':
            assert f'expected better, found {word}; ' in said
        else:  # the gain over masks without a place is held against the expectation, not the gain as such
            shown = 'one' if word == 'better' else 'none'
            assert f'expected no gain by place, {shown} shown (minus presence masks ' in said
            assert f'as a whole {word}; ' in said
        missed = expected == 'better' and word != 'better'
        assert ('The planted gain was not found' in said) == missed
        assert ('shuffled masks, which hold no place: +0.050' in said) == (expected == 'better')


@pytest.mark.parametrize('lo, where', ((0.10, 'below'), (0.35, 'not apart from'), (0.60, 'above')))
def test_masks_are_held_against_the_mean_mask(lo, where, tmp_path):
    e = Evidence('a study', str(tmp_path), 'real', 'of a kind')
    assert masks_learnt(e) == ''
    dice = lambda row, lo: dict(row=row, metric='dice', value=lo + 0.05, lo=lo, hi=lo + 0.1)
    t = pd.DataFrame([dice('multi-task', lo), dice('box prior', 0.4)])
    t.to_csv(tmp_path / 'table3.csv', index=False)
    assert [w for w in ('below', 'not apart from', 'above') if w in masks_learnt(e)] == [where]
    assert f'{lo + 0.05:.2f} ({lo:.2f}' in masks_learnt(e) and '0.45 (0.40 to 0.50)' in masks_learnt(e)


def test_what_was_not_asked_of_labels_is_said_only_where_it_was_not(tmp_path):
    e = Evidence('a study', str(tmp_path), 'real', 'of a kind')
    assert fewer_labels(e) == ''
    row = dict(row='MoCo, frozen features', than='ImageNet, frozen features', labels=0.3, question='ImageNet')
    row |= dict(metric='difference_auc_macro', value=0.005, lo=-0.029, hi=0.04)
    pd.DataFrame([row, row | dict(labels=1.0, value=0.9)]).to_csv(tmp_path / 'table6.csv', index=False)
    said = fewer_labels(e)
    assert said.startswith('with 30 % of the labels, encoder frozen, minus ImageNet: MoCo +0.005 (-0.029 to +0.040);')
    assert said.endswith('stays open') and '0.9' not in said
    tuned = row | dict(row='MoCo, fine-tuned', than='ImageNet, fine-tuned')
    pd.DataFrame([row, tuned]).to_csv(tmp_path / 'table6.csv', index=False)
    assert fewer_labels(e) == ''


def table_2(**auc):  # class -> value, half the width of its interval
    rows = [dict(metric=f'auc_{c}', value=v, lo=v - w, hi=v + w) for c, (v, w) in auc.items()]
    rows.append(dict(metric='auc_macro', value=0.64, lo=0.61, hi=0.67))
    return pd.DataFrame([*rows, dict(metric='accuracy', value=0.375, lo=0.331, hi=0.422)]).assign(row='a model')


def test_classes_at_chance_are_counted():
    chance = dict(negative=(0.77, 0.05), typical=(0.74, 0.06), indeterminate=(0.52, 0.07), atypical=(0.53, 0.06))
    said = at_chance(table_2(**chance).set_index('metric'))
    assert said.startswith('AUC not told from chance in 2 of 4 classes: indeterminate 0.52 (0.45 to 0.59), atypical')
    said = at_chance(table_2(**chance | dict(indeterminate=(0.62, 0.07), atypical=(0.6, 0.06))).set_index('metric'))
    assert said == 'told worst: atypical 0.60 (0.54 to 0.66)'
    prior = pd.DataFrame(dict(value=dict(accuracy=0.388, recall_negative=0.0, recall_atypical=1.0)))
    assert most_frequent(prior) == 'always saying atypical 0.388'
    assert 'most frequent class' in most_frequent(prior * 0.5)


def test_why_it_is_hard_has_the_paired_difference_of_the_scorecard(tmp_path):
    e = Evidence('a study', str(tmp_path), 'real', 'of a kind')
    assert why_hard(e) == ''
    t = table_2(negative=(0.77, 0.05), typical=(0.74, 0.06), indeterminate=(0.52, 0.07), atypical=(0.53, 0.06))
    prior, known = (t.assign(row=f'metadata baseline: {k}') for k in ('class prior', 'all metadata'))
    pd.concat([t, prior, known]).assign(n=250, n_units=201).to_csv(tmp_path / 'table2.csv', index=False)
    assert 'minus metadata' not in why_hard(e)
    (tmp_path / 'table7.json').write_text(
        json.dumps(dict(caption='**Table 7. Scorecard** of M, seed 3: x', verdict='v'))
    )
    card = dict(question='more than metadata tell?', result='minus metadata: +0.03 (-0.03 to +0.08), p 0.310')
    pd.DataFrame([card | dict(answer='inconclusive')]).to_csv(tmp_path / 'table7.csv', index=False)
    assert '(seed 3 minus metadata: +0.03 (-0.03 to +0.08), inconclusive)' in why_hard(e)


def test_the_first_page_says_what_the_tables_say_now():
    flat = lambda s: ' '.join(s.replace('\xa0', ' ').split())
    readme = flat((ROOT / 'README.md').read_text(encoding='utf-8'))
    assert flat(short_answers()) in readme, 'run `make readme`'
    other = tuple(Evidence(e.title, EVIDENCE[1].folder, e.kind, e.short, e.expected) for e in EVIDENCE)
    assert flat(short_answers(other)) not in readme


def test_fit_for_use_only_if_all_is_passed():
    card = lambda *answers: overall(pd.DataFrame(dict(answer=answers)))
    assert card('passed', 'passed').startswith('fit to be deployed (2 passed)')
    assert card('passed', 'inconclusive', 'not done').startswith('not shown to be fit to be deployed')
    assert card('passed', 'inconclusive', 'not passed').startswith('not fit to be deployed')


def test_a_gap_is_named_only_where_it_is_found():
    row = dict(metric='auc_macro', attribute='sex', group='F', gap=0.1, lo=0.02, hi=0.18, n=50, detectable=0.08)
    said = lambda **p: gap_verdict(pd.DataFrame([row | p]))
    assert 'gap found' in said(p=0.001, p_adjusted=0.01)
    assert 'no gap is shown' in said(p=0.2, p_adjusted=0.4) and 'gap found' not in said(p=0.2, p_adjusted=0.4)
    assert 'too few' in said(p=np.nan, p_adjusted=np.nan)


BOOK = [ROOT / 'README.md', *sorted((ROOT / 'nbs').glob('*.ipynb'))]
SAYS_TOO_MUCH = re.compile(r'(?i)\b(proves?|proof|looks? at|no model can|guarantees that)\b')


def too_much(text):
    return [m[0] for m in SAYS_TOO_MUCH.finditer(text)]


@pytest.mark.parametrize('page', BOOK, ids=lambda p: p.stem)
def test_the_prose_claims_no_more_than_a_study_can_show(page):
    text = page.read_text(encoding='utf-8')
    if page.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert too_much(text) == []


def test_prose_that_claims_too_much_is_found():
    assert too_much('The heat map proves that the model looks at the lungs.') == ['proves', 'looks at']
    assert too_much('The heat map is highest near the lungs.') == []
