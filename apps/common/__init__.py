"""What all trainers here share.

config.py      options of a run, from flags and YAML
command.py     the command line of a trainer: the mistakes that are found before ranks start
arguments.py   runs every command of the apps: errors in one line, exit statuses
run.py         one rank's part of a run
loop.py        its steps, which loader.py, schedule.py and optim.py serve
parallel.py    attention and engine as a configuration asks for them
engine.py      FSDP2 and DDP; zero.py: DeepSpeed
memory.py      what a block keeps for the backward
weights.py     first weights, the same on any mesh
estimate.py    memory and bytes of a step without a GPU
flops.py       conventions, and what GPUs can do
checkpoint.py, log.py, plot.py: what a run leaves behind
"""
