"""How is a network trained, with SAM and without? The loss, SAM, the step and the loop around it.

In: a domain and a `Train` model. Out: weights and a history; checkpoints to go on from, on a CPU to the same bits.
`instance` trains further on one pair.
"""
