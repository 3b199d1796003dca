"Reported numbers beside ours: found in the tables as they lie in figures/, refused with file, line and hint. Every value in here is made up."

import csv

import numpy as np
import pandas as pd
import pytest

from cxrpaper.evaluation import reported as R
from cxrpaper.evaluation.report import write_table
from cxrpaper.runs import InputError, project_root
from cxrpaper.study import read_study

PHANTOM = read_study('config/phantom.yaml')
FIGURES = project_root() / 'figures'


def write(path, *lines, columns=R.COLUMNS):
    "A made-up file: each line a dict."
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, columns)
        w.writeheader()
        for l in lines:
            w.writerow(dict(study='phantom', labels='', than='', source='made up for a test') | l)
    return path


def ours(name):
    return pd.read_csv(FIGURES / f'{name}.csv')


def test_the_committed_file_is_empty():
    assert (project_root() / 'config' / 'reported.csv').read_text() == ','.join(R.COLUMNS) + '\n'
    assert not len(R.read_reported('config/reported.csv', PHANTOM))


@pytest.mark.parametrize('name', R.TABLES)
def test_every_number_of_a_committed_table_can_be_named(name, tmp_path):
    "Each line's own name finds it, and nothing else; numbers that share a name are refused."
    have = R.numbers(ours(name))
    shared = have.duplicated(R.KEY, keep=False) | have.value.isna()
    assert (~shared).sum() > 20
    some = have[~shared].iloc[:: max(1, len(have) // 60)]
    made = write(
        tmp_path / 'r.csv',
        *[
            dict(table=name, value=f'{r.value - 0.01 if r.value > 0.5 else r.value + 0.01:.17g}')
            | {k: getattr(r, k) for k in R.KEY}
            for r in some.itertuples()
        ],
    )
    b = R.beside(name, ours(name), R.read_reported(made, PHANTOM))
    assert b.ours.tolist() == some.value.tolist()
    np.testing.assert_allclose(b.difference.abs(), 0.01, rtol=1e-6)
    for r in b.itertuples():
        assert r.within == ('no interval' if np.isnan(r.lo) else 'yes' if r.lo <= r.reported <= r.hi else 'no')
    if name == 'table8':
        twin = have[have.duplicated(R.KEY, keep=False)].iloc[:1] if have.duplicated(R.KEY).any() else None
        if twin is not None:
            with pytest.raises(InputError, match='numbers of table8 have this name'):
                R.beside(
                    name,
                    ours(name),
                    R.read_reported(
                        write(
                            tmp_path / 'r.csv',
                            *[
                                dict(table=name, value='0.5') | {k: getattr(r, k) for k in R.KEY}
                                for r in twin.itertuples()
                            ],
                        ),
                        PHANTOM,
                    ),
                )


def written(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_an_empty_file_changes_no_byte_and_a_filled_one_adds_only(tmp_path):
    long = ours('table2')
    block = pd.DataFrame([dict(model='a', AUC='0.5')])
    empty = write(tmp_path / 'empty.csv')
    put = lambda k, r: write_table('table2', long, [block], 'A caption.', [], tmp_path / k, r)
    put('without', None)
    put('empty', R.read_reported(empty, PHANTOM))
    row = long.row.iloc[0]
    value = long[(long.row == row) & (long.metric == 'auc_macro')].iloc[0]
    filled = write(
        tmp_path / 'filled.csv',
        dict(table='table2', row=row, metric='auc_macro', value='0.999'),
        dict(table='table2', row=row, metric='ap_macro', value='0.7'),
    )
    put('filled', R.read_reported(filled, PHANTOM))
    a, b, c = (written(tmp_path / k) for k in ('without', 'empty', 'filled'))
    assert a == b and set(c) - set(a) == {'table2_reported.csv'} and c['table2.csv'] == a['table2.csv']
    assert c['table2.md'].startswith(a['table2.md'].rstrip()) and c['table2.tex'].startswith(a['table2.tex'].rstrip())
    for k in ('table2.md', 'table2.tex'):
        text = c[k].decode()
        assert (
            'made up for a test' in text
            and '0.999' in text
            and 'Beside reported numbers' in text
            and f'{value.value - 0.999:+.3f}' in text
        )
    back = pd.read_csv(tmp_path / 'filled' / 'table2_reported.csv').iloc[0]
    assert (
        back.ours == value.value
        and back.within == ('yes' if value.lo <= 0.999 <= value.hi else 'no')
        and back.difference == value.value - 0.999
    )
    put('filled', R.read_reported(empty, PHANTOM))  # emptied again
    assert written(tmp_path / 'filled') == a


LINE = dict(table='table2', row='tf_efficientnet_lite0, imagenet', metric='auc_macro', value='0.5')
FAULTS = dict(
    table=(dict(table='table9'), 'line 3, column table: no such table'),
    study=(dict(study='smoek'), 'line 3, column study: not the name of a study file .*smoke'),
    word=(dict(value='high'), 'line 3, column value: not a number'),
    comma=(dict(value='0,81'), 'not a number'),
    missing=(dict(value=''), 'not a number'),
    infinite=(dict(value='inf'), 'not a number'),
    percent=(dict(value='81.2'), 'line 3, column value: not a fraction .*divide percentages by 100'),
    negative=(dict(value='-0.2'), 'below zero'),
    source=(dict(source=' '), 'line 3, column source: no source'),
    share=(
        dict(table='table6', row='ImageNet, linear', labels='10%'),
        "line 3, column labels: '10%' is not in table6. Hint: use one of 0.1 | 1",
    ),
    row=(
        dict(row='densenet121, imagenet'),
        'line 3, column row: .*densenet121, imagenet.*use one of tf_efficientnet_lite0, imagenet',
    ),
    metric=(dict(metric='AUC'), 'line 3, column metric: .*use one of auc_macro'),
    than=(
        dict(table='table3', row='multi-task', metric='difference_auc_macro'),
        "line 3, column metric: 'difference_auc_macro' is not in table3",
    ),
)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_named_with_its_line(fault, tmp_path):
    change, words = FAULTS[fault]
    good = dict(LINE) | dict(metric='ap_macro')
    bad = LINE | change

    def read(*lines):
        r = R.read_reported(write(tmp_path / 'made_up.csv', *lines), PHANTOM)
        for t in ('table2', 'table3', 'table6'):
            R.beside(t, ours(t), r)

    read(good, LINE)  # silent without it
    pattern = words.replace('|', r'\|') if fault == 'share' else words
    with pytest.raises(InputError, match=pattern) as e:
        read(good, bad)
    assert 'made_up.csv' in str(e.value) and e.value.hint


def test_a_difference_may_be_negative_and_needs_its_other_row(tmp_path):
    line = dict(table='table3', row='multi-task', than='single-task', metric='difference_auc_macro', value='-0.02')
    b = R.beside('table3', ours('table3'), R.read_reported(write(tmp_path / 'r.csv', line), PHANTOM))
    assert len(b) == 1 and R.readable(b).model[0] == 'multi-task, minus single-task'


def test_duplicates_wrong_columns_and_absent_tables(tmp_path):
    t6 = dict(table='table6', row='ImageNet, linear', metric='auc_macro', value='0.5')
    with pytest.raises(InputError, match='line 3, column row: a second number'):
        R.read_reported(write(tmp_path / 'r.csv', t6 | dict(labels='0.1'), t6 | dict(labels='.10')), PHANTOM)
    with pytest.raises(InputError, match='column'):
        R.read_reported(write(tmp_path / 'r.csv', columns=[*R.COLUMNS, 'remark']), PHANTOM)
    with pytest.raises(InputError, match='no such file'):
        R.read_reported(tmp_path / 'none.csv', PHANTOM)
    with pytest.raises(InputError, match='does not make this table'):
        R.read_reported(write(tmp_path / 'r.csv', t6 | dict(labels='0.1')), PHANTOM | dict(table6=None))


def test_lines_of_other_studies_are_checked_and_left_alone(tmp_path):
    other = LINE | dict(study='study', row='densenet121, imagenet')
    r = R.read_reported(write(tmp_path / 'r.csv', LINE, other), PHANTOM)
    assert len(r) == 1 and r.attrs['others'] == 1
    with pytest.raises(InputError, match='line 3'):
        R.read_reported(write(tmp_path / 'r.csv', LINE, other | dict(value='x')), PHANTOM)
