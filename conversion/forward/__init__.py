"""A source or converted layer run over text, one layer in memory at a time.

In: a source, windows of token ids. Out: hidden states, attention weights, outputs and logits, in float32. What a method
measures of them is its own.
"""
