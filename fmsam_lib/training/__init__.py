"""How is a network trained, with SAM and without? The loss, SAM, the step and the loop around it.

In: a domain and a `Train` model. Out: weights and a history; checkpoints that go on to the same bits after a kill.
`instance` trains further on one pair.
"""
