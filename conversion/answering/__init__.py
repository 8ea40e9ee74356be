"""Prompts answered by a checkpoint, converted or not, as a user of Transformers would have them answered.

In: a checkpoint, and what is said to it. Out: answers, piece by piece, with what they took of cache and time.
"""
