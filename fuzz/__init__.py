"""Random calls of everything that this package offers, valid and not, compared with the definition.

    calls.py      what is called, with what: plain data, drawn from a seed
    rules.py      what the documentation says of such a call: right, or which arguments are at fault
    arguments.py  the data made into tensors and numbers
    case.py       a call as a function of its tensors
    ways.py       how it is called: by threads, under fake tensors, in place, ...
    derivatives.py   with gradients, second ones, tangents, under vmap
    others.py     what takes no tensors: the swaps of norms, the launch plan
    oracle.py     the definition in fp64, and how far from it is right
    check.py      one call judged
    server.py     many calls in processes of their own: a crash costs one, and is shrunk
    soak.py       a small model trained for minutes
    sanitized.py  the extension built once more, under AddressSanitizer and UBSan

`make fuzz FUZZ_ARGS="--seed 7 --calls 10000"`; docs/broken.md says what has been found.
"""
