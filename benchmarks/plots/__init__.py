"""The plots of the documentation, drawn from the committed results: ``python -m benchmarks.plots``.

style.py has the colours and what all plots share; the other files have one subject each. Nothing is
measured here. Every plot is an SVG without a background, in colours that are readable on white and
on black, and names the results that it was drawn from.
"""
