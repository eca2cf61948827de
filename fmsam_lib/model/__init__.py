"""How does a network map one image onto another? The GradICON network, its transforms and its weights.

In: two images `(N, 1, *S)` in [0, 1]. Out: a `Transform` phi with `moving(phi(x)) ~ fixed(x)`; networks from and to
files, uniGradICON's among them.
"""
