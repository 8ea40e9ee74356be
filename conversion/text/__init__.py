"""Text that a model is measured on: windows of token ids, from a file, a data set or the default mix.

In: what the user names, and a tokenizer. Out: ``[N, S]`` token ids. A new kind of source is one branch in `windows`; a
domain of the default mix one entry there.
"""

SELF_WRITTEN = "self"
"""What a user names for text that the model writes itself."""
