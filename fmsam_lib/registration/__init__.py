"""How is one pair of files registered? From two files to a warped image and a transform that other tools apply.

In: two image files (labels too, if there are any) and a network. Out: a `Registration`, and a folder with all of its
results or none; the command `fmsam-register`.
"""
