"""How far a converted model is from its source: scores, agreement, recall, tasks.

In: a converted checkpoint, its source, text. Out: a `Verification` or an `Assessment`; an error where one contradicts
what the method promises. A new measure is one file.
"""
