"""How is a registration explored by hand? Sliders and linked views in a notebook.

In: a pair and its map, or a function that draws. Out: widgets; without a kernel the still picture that they begin with.
"""
