"""What do images look like whose true map is known? Synthetic anatomies, MR and CT, in 2-D and 3-D.

In: the name of an anatomy, a seed, a number, a grid. Out: a labelled `Pair` with its true map and landmarks, the same
each time.
"""
