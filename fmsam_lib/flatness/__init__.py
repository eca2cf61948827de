"""How flat is the loss around trained weights? Slopes, rises, curvature, lines, planes, paths between solutions.

In: a network, one fixed batch and the settings of its loss. Out: tidy tables; the network stays as it is.
"""
