"""A converted model learns from the model that it was made from.

In: a converted checkpoint, its source, text by weights. Out: the same checkpoint with better weights, or its own where
nothing improved. What is learnt is in `stages`, one file each.
"""
