"""The folder in which an output is made: its lock, its journal, and what the stages leave in it.

In: what one stage leaves. Out: the same, for the next stage or for a later run.
"""
