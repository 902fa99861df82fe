"""What every trainer here shares.

config.py   options of a run, from flags and YAML        command.py  the command line, and what is wrong before ranks start
run.py      one rank's part of a run                     loop.py     its steps; loader.py, schedule.py, optim.py serve them
engine.py   FSDP2 and DDP; zero.py DeepSpeed             parallel.py attention and engine as a configuration asks for them
memory.py   what a block keeps for the backward          weights.py  first weights, the same on any mesh
estimate.py memory and bytes of a step without a GPU     flops.py    conventions, and what GPUs can do
checkpoint.py, log.py, plot.py: what a run leaves behind
"""
