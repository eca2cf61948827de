"""How well do networks register, and do two differ? Methods x test pairs x metrics, and their statistics.

In: networks or other methods, and domains. Out: tidy tables with one row a value; differences with intervals, curves
of corrupted images, correlations with flatness.
"""
