"""Distillation of the source's logits into a converted model's attention.

In: a converted checkpoint, its source, text. Out: the same checkpoint with better weights, or its own where nothing
improved. A new loss is one function in `losses`.
"""
