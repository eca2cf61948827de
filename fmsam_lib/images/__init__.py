"""Where do pairs come from? Files, manifests and synthetic anatomies behind one interface, a domain.

In: a domain's name and a grid; for data sets a folder with a manifest. Out: training, validation and test pairs,
canonical, in [0, 1], on that grid; a `DataError` that names file, fault and remedy.
"""
