"""How does a study file become a report? The grid of runs, the notebooks that compute it, what they left.

In: a file of `studies/`. Out: `runs/<study>/` with every table, figure and the report, computed by `python -m
fmsam_lib.study NAME`; what is there already is not computed again.
"""
