"""What the project measures: one folder per question, each with one command.

norms          How fast are the norms, and how do they compare? ``make bench``
models         What is a swap worth in models of transformers? ``make models``
paper          What does the paper claim, and what is found here? ``make paper``
compile_modes  What does torch.compile make of the norms?
compiled       What do the compiled CUDA kernels cost, by count?
instructions   How many instructions do the CPU kernels take?
gpu            All that needs a GPU, in one command: ``make gpu``
compare        What has become slower between two results files?
harness        How the others time, count and keep what they find; no command of its own
results        What was measured, by hardware; committed

Every folder but the last two runs by ``python -m benchmarks.FOLDER``, and ``--help`` lists its
options.
"""
