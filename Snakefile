# The study as a graph of papermill runs. Which runs there are: config/*.yaml, read by the module study (notebook 00_study).
# A job executes one notebook; its output is the executed notebook, moved into place when it ran to its end.
import shlex
from cxrpaper.runs import code_modules
from cxrpaper.study import grid, papermill_yaml, pretraining_runs, read_study

study = read_study(config.get('study', 'config/smoke.yaml'))
profile = study['profile']
RUNS = f"runs/{study['name']}"
PHANTOM = study['data_root'] is None or study['phantom'] is not None # the images are made here
DATA = {k: study[k] for k in ('data_root', 'adapter')}
MODELS = grid(study)
PRETRAINED = pretraining_runs(study) # of which MODELS may start
PRETRAINING = dict(moco='nbs/03_moco.ipynb', inpainting='nbs/03_inpainting.ipynb')
OTHER_PHANTOM = [f'{RUNS}/pretraining_phantom.ipynb'] if PRETRAINED and study['pretraining']['phantom'] is not None else []
PAPERMILL = ('export OMP_NUM_THREADS={threads}; papermill --no-progress-bar --log-level WARNING {input.nb} {output}.tmp -y {params.y} >{log} 2>&1 '
             '&& mkdir -p $(dirname {output}) && mv {output}.tmp {output}')

def code(module): return [f'cxrpaper/{m}.py' for m in code_modules(module)] # it and all that it imports

def yaml_for(**params): return shlex.quote(papermill_yaml(dict(profile=profile) | params))

rule all:
    input: f'{RUNS}/tables.ipynb', f'{RUNS}/figures.ipynb', [f'{RUNS}/representations.ipynb'] if PRETRAINED else []

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

if OTHER_PHANTOM:
    rule pretraining_phantom:
        input: nb='nbs/00_phantom.ipynb', code=code('phantom')
        output: f'{RUNS}/pretraining_phantom.ipynb'
        params: y=yaml_for(**study['pretraining']['phantom'], out=study['pretraining']['data_root'])
        log: f'{RUNS}/logs/pretraining_phantom.log'
        shell: PAPERMILL

rule pretrain:
    input: nb=lambda w: PRETRAINING[w.method], data=[f'{RUNS}/store.ipynb'] + OTHER_PHANTOM,
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
    input: nb='nbs/06_tables.ipynb', code=code('tables'), study=config.get('study', 'config/smoke.yaml'),
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
