# The study as a graph of papermill runs. Which runs there are: config/*.yaml, read by the module study (notebook 00_study).
# A job executes one notebook; its output is the executed notebook, moved into place when it ran to its end.
# It runs again when its parameters change, or the code of its notebook or modules (prose and times of sources do not count), or what other jobs gave it, or a file of the corpus that it reads.
import functools, shlex
from snakemake.exceptions import WorkflowError
from cxrpaper.runs import KERNELS, digest, job_digest, page_of, project_root
from cxrpaper.schema import our_methods
from cxrpaper.study import check_folder, corpus_state, evaluated_rows, grid, leaking_rows, papermill_yaml, pretraining_runs, read_study, row_runs, saved_cohort

STUDY = config.get('study', 'config/smoke.yaml')
study = read_study(STUDY)
check_folder(study, STUDY)
profile = study['profile']
RUNS = f"runs/{study['name']}"
PHANTOM = study['data_root'] is None or study['phantom'] is not None # the images are made here
DATA, SAVED = {k: study[k] for k in ('data_root', 'adapter')}, saved_cohort(study) # what the first job reads, what it leaves to the others
DECODING = max(2, study['threads']) # processes that decode
MODELS = grid(study)
PRETRAINED = pretraining_runs(study) # of which MODELS may start
PRETRAINING = {m: f'training.{m}' for m in our_methods()} # the modules of their notebooks
EVALUATED = evaluated_rows(study) # the first of them in depth
PHANTOMS = {k: v for k,v in dict(pretraining=PRETRAINED and study['pretraining'], external=EVALUATED and study['readiness']['external']).items() if v and v['phantom'] is not None} # further ones
def brought_to_readiness(): return [(study['readiness']['external'] or {}).get('data_root') if not made('external') else None, *(study['readiness'].get(k) for k in ('readers', 'reread'))]
def made(kind): return [f'{RUNS}/{kind}_phantom.ipynb'] if kind in PHANTOMS else []

# A job that an interrupted study has left running on a cluster is waited for, not doubled.
PAPERMILL = ('exec 8>.snakemake/$(tr / - <<<{log}).lock; ! command -v flock >/dev/null || flock 8; export OMP_NUM_THREADS={threads}; cxr_papermill --engine cxr-job --no-progress-bar --log-level WARNING {input.nb} {output}.tmp -y {params.y} >{log} 2>&1 '
             '&& mkdir -p $(dirname {output}) && mv {output}.tmp {output}')
# What runs without a GPU computes with the instruction sets that every x86-64 processor of the last ten years has, so that they do not decide what it finds; what is set by hand wins.
if profile != 'study':
    PAPERMILL = ''.join(f'export {k}=${{{{{k}:-{v}}}}}; ' for k, v in KERNELS.items()) + PAPERMILL
CPU = 'export CUDA_VISIBLE_DEVICES=; ' + PAPERMILL # who does not ask for a GPU sees none
# A job takes its GPUs from those that CUDA_VISIBLE_DEVICES or nvidia-smi name: all that it needs or none; of a GPU with SLOTS places a job of one GPU takes one place, a job of several takes them whole. The kernel drops the locks when it ends, however it ends. What SLURM has given needs no lock.
GPU = r"""if [ {resources.gpu} = 0 ]; then export CUDA_VISIBLE_DEVICES=; else
  IFS=$',\n '; n={resources.gpu}; all=(${{CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/.*UUID: \(GPU-[^)]*\)).*/\1/p')}})
  if [ ${{#all[@]}} -lt $n ]; then echo "{rule} takes $n GPU, here are ${{#all[@]}} (CUDA_VISIBLE_DEVICES, nvidia-smi)" | tee {log} >&2; exit 1; fi
  mine=(${{all[@]}}); if [ ! "${{SLURM_JOB_ID-}}" ] || [ ${{#all[@]}} -gt $n ]; then while :; do
    mine=(); fds=()
    for d in ${{all[@]}}; do
      if [ ${{#mine[@]}} -lt $n ]; then
        got=0; for s in $(seq ${{SLOTS:-1}}); do if [ $n = 1 ] && [ $got = 1 ]; then break; fi
          exec {{fd}}>.snakemake/gpu-$HOSTNAME-${{d//\//-}}-$s.lock; fds+=($fd); if flock -n $fd; then got=$((got+1)); fi; done
        if [ $got = $([ $n = 1 ] && echo 1 || echo ${{SLOTS:-1}}) ]; then mine+=($d); fi
      fi
    done
    if [ ${{#mine[@]}} -eq $n ]; then break; fi
    for fd in ${{fds[@]}}; do exec {{fd}}>&-; done; sleep .$RANDOM
  done; fi
  export CUDA_VISIBLE_DEVICES="${{mine[*]}}"
fi; """ + PAPERMILL
# for SLURM: memory for the libraries and for batches of px x px, minutes; a retry gets more of both and goes on from the last checkpoint
COST = dict(gpu=study['gpus'], mem_mb=lambda w, attempt: attempt*(4000 + 60*study['px']**2//1000), runtime=lambda w, attempt: attempt*dict(smoke=60, open=240, study=720)[profile])

MINUTES = dict(smoke=5, phantom=16) # measured on two cores, with nothing else running
onstart:
    print(f"{study['name']}: {len(MODELS)} trainings after {len(PRETRAINED)} pre-trainings" + (f", about {MINUTES[study['name']]} minutes on two cores" if study['name'] in MINUTES else ' (make plan says how long)') +
          f". Figure 1 comes first: {study['figures']}/figure1.png. What runs stands below, with its log", flush=True)
    gpus = workflow.global_resources.get('gpu') # of this machine, as `make paper` counts them
    if gpus and gpus.value is not None and gpus.value < study['gpus']:
        raise WorkflowError(f"{STUDY} takes {study['gpus']} GPU a training and this machine has {gpus.value}. "
                            "Run it on a machine with a GPU or on a cluster (make paper EXECUTOR=slurm), or set gpus: 0 there to train on the CPU.")

code = functools.cache(job_digest) # of a notebook's own cells and of what its module is made of; a parameter, since inputs are compared by their times and whole text
def page(module): return ancient(page_of(module).relative_to(project_root()).as_posix())

def yaml_for(**params): return shlex.quote(papermill_yaml(dict(profile=profile) | params))

PAGES = [f'{RUNS}/{k}.ipynb' for k in ('tables', 'figures', 'diagram', *(['representations'] if PRETRAINED else []), *(['reports'] if EVALUATED else []))] # what a study ends with

rule all:
    input: f'{RUNS}/results.ipynb'

if PHANTOM:
    rule phantom:
        input: nb=page('data.phantom')
        output: f'{RUNS}/phantom.ipynb'
        params: code=code('data.phantom'), y=yaml_for(**(study['phantom'] or {}), out=study['data_root'])
        log: f'{RUNS}/logs/phantom.log'
        threads: 2
        shell: CPU

rule cohort:
    priority: 2
    input: nb=page('data.cohort'), data=[f'{RUNS}/phantom.ipynb'] if PHANTOM else []
    output: f'{RUNS}/cohort.ipynb'
    params: code=code('data.cohort'), data=lambda w: None if PHANTOM else corpus_state(study['data_root']), y=yaml_for(**DATA, n_folds=study['n_folds'], px=study['px'], workers=DECODING, out=f'{RUNS}/cohort') # the store of px comes with the search for copies: each file is decoded once
    log: f'{RUNS}/logs/cohort.log'
    threads: DECODING
    shell: CPU

rule store:
    input: nb=page('data.store'), data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/store.ipynb'
    params: code=code('data.store'), y=yaml_for(**SAVED, px=study['px'], workers=DECODING)
    log: f'{RUNS}/logs/store.log'
    threads: DECODING
    shell: CPU

rule baselines:
    input: nb=page('evaluation.baselines'), data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/baselines.ipynb'
    params: code=code('evaluation.baselines'), y=yaml_for(**SAVED, n_folds=study['n_folds'], out=f'{RUNS}/baselines')
    log: f'{RUNS}/logs/baselines.log'
    shell: CPU

if PHANTOMS:
    rule further_phantom:
        input: nb=page('data.phantom')
        output: f'{RUNS}/{{which}}_phantom.ipynb'
        wildcard_constraints: which='|'.join(PHANTOMS)
        params: code=code('data.phantom'), y=lambda w: yaml_for(**PHANTOMS[w.which]['phantom'], out=PHANTOMS[w.which]['data_root'])
        log: f'{RUNS}/logs/{{which}}_phantom.log'
        shell: CPU

rule pretrain:
    input: nb=lambda w: page(PRETRAINING[w.method]), data=[f'{RUNS}/store.ipynb'] + made('pretraining')
    output: f'{RUNS}/{{method}}/{{arch}}/pretraining.ipynb'
    priority: 1 # many models wait for it
    wildcard_constraints: method='|'.join(PRETRAINING)
    params: code=lambda w: code(PRETRAINING[w.method]), data=lambda w: None if made('pretraining') else corpus_state(study['pretraining']['data_root']), y=lambda w: yaml_for(**{k: v for k,v in PRETRAINED[f'{RUNS}/{w.method}/{w.arch}'][1].items() if k != 'profile'}, run=f'{RUNS}/{w.method}/{w.arch}')
    log: f'{RUNS}/logs/{{method}}/{{arch}}.log'
    threads: study['threads']
    resources: **COST
    retries: 2
    shell: GPU.replace('{output}.tmp', f'{RUNS}/{{wildcards.method}}/.{{wildcards.arch}}.ipynb')

# the models of the grid, in finetune/ those of Tables 2 to 4, in labels/ those of Table 6
rule finetune:
    input: nb=page('training.finetune'), data=f'{RUNS}/store.ipynb',
           weights=lambda w: [f'{f}/pretraining.ipynb' for f in [MODELS[f'{RUNS}/{w.kind}/{w.name}'].get('weights')] if f]
    output: f'{RUNS}/{{kind}}/{{name}}/04_finetune.ipynb'
    wildcard_constraints: kind='finetune|labels'
    params: code=code('training.finetune'), y=lambda w: yaml_for(**{k: v for k,v in MODELS[f'{RUNS}/{w.kind}/{w.name}'].items() if k != 'profile'}, run=f'{RUNS}/{w.kind}/{w.name}')
    log: f'{RUNS}/logs/{{kind}}/{{name}}.log'
    threads: study['threads']
    resources: **COST
    retries: 2
    shell: GPU.replace('{output}.tmp', f'{RUNS}/{{wildcards.kind}}/.{{wildcards.name}}.ipynb')

rule tables:
    input: nb=page('paper.tables'), study=STUDY, reported='config/reported.csv', plan='config/plan.yaml',
           baselines=f'{RUNS}/baselines.ipynb', models=[f'{m}/04_finetune.ipynb' for m in MODELS]
    output: f'{RUNS}/tables.ipynb'
    params: code=code('paper.tables'), y=yaml_for(study=STUDY, out=study['figures'], missing='error')
    log: f'{RUNS}/logs/tables.log'
    shell: CPU

rule figures:
    input: nb=page('paper.figures'),
           study=STUDY, baselines=f'{RUNS}/baselines.ipynb', models=[f'{m}/04_finetune.ipynb' for m in MODELS]
    output: f'{RUNS}/figures.ipynb'
    params: code=code('paper.figures'), y=yaml_for(study=STUDY, out=study['figures'], missing='error')
    log: f'{RUNS}/logs/figures.log'
    shell: CPU

if PRETRAINED:
    rule representations:
        input: nb=page('paper.representations'),
               study=STUDY, models=[f'{m}/pretraining.ipynb' for m in PRETRAINED]
        output: f'{RUNS}/representations.ipynb'
        params: code=code('paper.representations'), y=yaml_for(study=STUDY, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/representations.log'
        shell: CPU

if EVALUATED:
    rule readiness:
        input: nb=page('questions.readiness'), study=STUDY, reported='config/reported.csv', baselines=f'{RUNS}/baselines.ipynb', external=made('external'),
               models=[f'{m}/04_finetune.ipynb' for row in [*EVALUATED, *leaking_rows(study).values()] for m in row_runs(study, row)]
        output: f'{RUNS}/readiness.ipynb'
        params: code=code('questions.readiness'), data=lambda w: corpus_state(*brought_to_readiness()), y=yaml_for(study=STUDY, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/readiness.log'
        threads: study['threads']
        resources: **COST
        retries: 2
        shell: GPU

    rule reports: # last, since what they point at must be there
        input: nb=page('paper.reports'), study=STUDY, data=[f'{RUNS}/{k}.ipynb' for k in ('tables', 'figures', 'readiness')]
        output: f'{RUNS}/reports.ipynb'
        params: code=code('paper.reports'), y=yaml_for(study=STUDY, out=study['figures'], missing='error')
        log: f'{RUNS}/logs/reports.log'
        shell: CPU

rule diagram:
    priority: 2 # something to look at
    input: nb=page('paper.diagram'), study=STUDY, data=f'{RUNS}/cohort.ipynb'
    output: f'{RUNS}/diagram.ipynb'
    params: code=[code(m) for m in ('paper.diagram', *PRETRAINING.values(), 'training.finetune')], y=yaml_for(study=STUDY, out=study['figures'], missing='error') # it shows the defaults of three notebooks
    log: f'{RUNS}/logs/diagram.log'
    shell: CPU

rule results: # the page that shows them all, when all are there
    input: nb=page('paper.provenance'), study=STUDY, data=PAGES
    output: f'{RUNS}/results.ipynb'
    params: code=code('paper.provenance'), y=yaml_for(study=STUDY, at=RUNS)
    log: f'{RUNS}/logs/results.log'
    shell: CPU

# by hand, before anything else: `snakemake runs/study/data.ipynb --config study=config/study.yaml` holds the copy at data_root against what is published (01_download tells how to get it)
rule data:
    input: nb=page('data.download')
    output: f'{RUNS}/data.ipynb'
    params: code=code('data.download'), y=yaml_for(root=study['data_root'], corpus=None if PHANTOM or study['adapter'] == 'auto' else study['adapter'])
    log: f'{RUNS}/logs/data.log'
    shell: CPU

# by hand, on the machine that a plan is made for: `make measure` times every kind of training of the study (04_costs)
rule costs:
    input: nb=page('training.throughput')
    output: f'{RUNS}/costs.ipynb'
    params: code=code('training.throughput'), y=yaml_for(study=STUDY, measure=True)
    log: f'{RUNS}/logs/costs.log'
    threads: study['threads']
    resources: **COST
    shell: GPU
