"""How do registrations and tables look? The style of all figures and the slices of a registration.

In: a pair and its map, or a tidy table. Out: a matplotlib `Figure`; an optimizer looks the same in every one.
"""
