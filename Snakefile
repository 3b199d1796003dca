# The study as a graph of papermill runs. Which runs there are: config/*.yaml, read by the module study (notebook 00_study).
# A job executes one notebook; its output is the executed notebook, moved into place when it ran to its end.
import shlex
from cxrpaper.runs import code_modules
from cxrpaper.study import evaluated_rows, grid, leaking_rows, papermill_yaml, pretraining_runs, read_study, row_runs

study = read_study(config.get('study', 'config/smoke.yaml'))
profile = study['profile']
RUNS = f"runs/{study['name']}"
PHANTOM = study['data_root'] is None or study['phantom'] is not None # the images are made here
DATA = {k: study[k] for k in ('data_root', 'adapter')}
MODELS = grid(study)
PRETRAINED = pretraining_runs(study) # of which MODELS may start
PRETRAINING = dict(moco='nbs/03_moco.ipynb', inpainting='nbs/03_inpainting.ipynb')
EVALUATED = evaluated_rows(study) # the first of them in depth
PHANTOMS = {k: v for k,v in dict(pretraining=PRETRAINED and study['pretraining'], external=EVALUATED and study['readiness']['external']).items() if v and v['phantom'] is not None} # further ones
def made(kind): return [f'{RUNS}/{kind}_phantom.ipynb'] if kind in PHANTOMS else []
PAPERMILL = ('export OMP_NUM_THREADS={threads}; papermill --no-progress-bar --log-level WARNING {input.nb} {output}.tmp -y {params.y} >{log} 2>&1 '
             '&& mkdir -p $(dirname {output}) && mv {output}.tmp {output}')

def code(module): return [f'cxrpaper/{m}.py' for m in code_modules(module)] # it and all that it imports

def yaml_for(**params): return shlex.quote(papermill_yaml(dict(profile=profile) | params))

PAGES = [f'{RUNS}/{k}.ipynb' for k in ('tables', 'figures', 'diagram', *(['representations'] if PRETRAINED else []), *(['reports'] if EVALUATED else []))] # what a study ends with

rule all:
    input: f'{RUNS}/results.ipynb'

if PHANTOM:
    rule phantom:
        input: nb='nbs/00_phantom.ipynb', code=code('phantom')
        output: f'{RUNS}/phantom.ipynb'
        params: y=yaml_for(**(study['phantom'] or {}), out=study['data_root'])
        log: f'{RUNS}/logs/phantom.log'
        threads: 2
        shell: PAPERMILL

rule cohort:
    input: nb='nbs/01_cohort.ipynb', code=code('cohort'), data=[f'{RUNS}/phantom.ipynb'] if PHANTOM else []
    output: f'{RUNS}/cohort.ipynb'
    params: y=yaml_for(**DATA, n_folds=study['n_folds'], out=f'{RUNS}/cohort')
    log: f'{RUNS}/logs/cohort.log'
    shell: PAPERMILL

rule store:
    input: nb='nbs/01_store.ipynb', code=code('store'), data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/store.ipynb'
    params: y=yaml_for(**DATA, px=study['px'])
    log: f'{RUNS}/logs/store.log'
    threads: 2
    shell: PAPERMILL

rule floors:
    input: nb='nbs/04_floors.ipynb', code=code('floors'), data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/floors.ipynb'
    params: y=yaml_for(**DATA, n_folds=study['n_folds'], out=f'{RUNS}/floors')
    log: f'{RUNS}/logs/floors.log'
    shell: PAPERMILL

if PHANTOMS:
    rule further_phantom:
        input: nb='nbs/00_phantom.ipynb', code=code('phantom')
        output: f'{RUNS}/{{which}}_phantom.ipynb'
        wildcard_constraints: which='|'.join(PHANTOMS)
        params: y=lambda w: yaml_for(**PHANTOMS[w.which]['phantom'], out=PHANTOMS[w.which]['data_root'])
        log: f'{RUNS}/logs/{{which}}_phantom.log'
        shell: PAPERMILL

rule pretrain:
    input: nb=lambda w: PRETRAINING[w.method], data=[f'{RUNS}/store.ipynb'] + made('pretraining'),
           code=lambda w: code(w.method)
    output: f'{RUNS}/{{method}}/{{arch}}/pretraining.ipynb'
    wildcard_constraints: method='|'.join(PRETRAINING)
    params: y=lambda w: yaml_for(**{k: v for k,v in PRETRAINED[f'{RUNS}/{w.method}/{w.arch}'][1].items() if k != 'profile'}, run=f'{RUNS}/{w.method}/{w.arch}')
    log: f'{RUNS}/logs/{{method}}/{{arch}}.log'
    threads: study['threads']
    resources: gpu=study['gpus']
    shell: PAPERMILL.replace('{output}.tmp', f'{RUNS}/{{wildcards.method}}/.{{wildcards.arch}}.ipynb')

# the models of the grid, in finetune/ those of Tables 2 to 4, in labels/ those of Table 6
rule finetune:
    input: nb='nbs/04_finetune.ipynb', data=f'{RUNS}/store.ipynb',
           weights=lambda w: [f'{f}/pretraining.ipynb' for f in [MODELS[f'{RUNS}/{w.kind}/{w.name}'].get('weights')] if f],
           code=code('finetune')
    output: f'{RUNS}/{{kind}}/{{name}}/04_finetune.ipynb'
    wildcard_constraints: kind='finetune|labels'
    params: y=lambda w: yaml_for(**{k: v for k,v in MODELS[f'{RUNS}/{w.kind}/{w.name}'].items() if k != 'profile'}, run=f'{RUNS}/{w.kind}/{w.name}')
    log: f'{RUNS}/logs/{{kind}}/{{name}}.log'
    threads: study['threads']
    resources: gpu=study['gpus']
    shell: PAPERMILL.replace('{output}.tmp', f'{RUNS}/{{wildcards.kind}}/.{{wildcards.name}}.ipynb')

rule tables:
    input: nb='nbs/06_tables.ipynb', code=code('tables'), study=config.get('study', 'config/smoke.yaml'), reported='config/reported.csv',
           floors=f'{RUNS}/floors.ipynb', models=[f'{m}/04_finetune.ipynb' for m in MODELS]
    output: f'{RUNS}/tables.ipynb'
    params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
    log: f'{RUNS}/logs/tables.log'
    shell: PAPERMILL

rule figures:
    input: nb='nbs/07_figures.ipynb', code=code('figures'),
           study=config.get('study', 'config/smoke.yaml'), floors=f'{RUNS}/floors.ipynb', models=[f'{m}/04_finetune.ipynb' for m in MODELS]
    output: f'{RUNS}/figures.ipynb'
    params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
    log: f'{RUNS}/logs/figures.log'
    shell: PAPERMILL

if PRETRAINED:
    rule representations:
        input: nb='nbs/07_representations.ipynb', code=code('representations'),
               study=config.get('study', 'config/smoke.yaml'), models=[f'{m}/pretraining.ipynb' for m in PRETRAINED]
        output: f'{RUNS}/representations.ipynb'
        params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/representations.log'
        shell: PAPERMILL

if EVALUATED:
    rule readiness:
        input: nb='nbs/05_readiness.ipynb', code=code('readiness'), study=config.get('study', 'config/smoke.yaml'), floors=f'{RUNS}/floors.ipynb', external=made('external'),
               models=[f'{m}/04_finetune.ipynb' for row in [*EVALUATED, *leaking_rows(study).values()] for m in row_runs(study, row)]
        output: f'{RUNS}/readiness.ipynb'
        params: y=lambda w, input: yaml_for(study=input.study, missing='error')
        log: f'{RUNS}/logs/readiness.log'
        threads: study['threads']
        resources: gpus=study['gpus']
        shell: PAPERMILL

    rule scorecard:
        input: nb='nbs/06_scorecard.ipynb', code=code('scorecard'), study=config.get('study', 'config/smoke.yaml'), reported='config/reported.csv', data=f'{RUNS}/readiness.ipynb'
        output: f'{RUNS}/scorecard.ipynb'
        params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/scorecard.log'
        shell: PAPERMILL

    rule evaluation:
        input: nb='nbs/07_evaluation.ipynb', code=code('evaluation'), study=config.get('study', 'config/smoke.yaml'), data=f'{RUNS}/readiness.ipynb'
        output: f'{RUNS}/evaluation.ipynb'
        params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/evaluation.log'
        shell: PAPERMILL

    rule reports: # last, since what they point at must be there
        input: nb='nbs/06_reports.ipynb', code=code('reports'), study=config.get('study', 'config/smoke.yaml'), data=[f'{RUNS}/{k}.ipynb' for k in ('tables', 'figures', 'scorecard', 'evaluation')]
        output: f'{RUNS}/reports.ipynb'
        params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/reports.log'
        shell: PAPERMILL

rule diagram:
    input: nb='nbs/07_diagram.ipynb', code=code('diagram'), defaults=['nbs/03_moco.ipynb', 'nbs/03_inpainting.ipynb', 'nbs/04_finetune.ipynb'],
           study=config.get('study', 'config/smoke.yaml'), data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/diagram.ipynb'
    params: y=lambda w, input: yaml_for(study=input.study, out=study['figures'], missing='error')
    log: f'{RUNS}/logs/diagram.log'
    shell: PAPERMILL

rule results: # the page that shows them all, when all are there
    input: nb='nbs/08_results.ipynb', code=code('results'), study=config.get('study', 'config/smoke.yaml'), data=PAGES
    output: f'{RUNS}/results.ipynb'
    params: y=lambda w, input: yaml_for(study=input.study, at=RUNS)
    log: f'{RUNS}/logs/results.log'
    shell: PAPERMILL
