"""What every benchmark is made with; it measures nothing by itself.

timing       times contenders against each other, with the noise of the comparison
results      the JSON file that a run fills, and can be resumed from
environment  hardware and software of the run
memory       bytes that autograd keeps for the backward
copies       copies of memory, the yardstick of a kernel that memory limits
tables       what the reports share: Markdown tables, cells, the command line
optional     tqdm and matplotlib, or what does without
"""
