"""The method of this project, its steps in files of their own; `method` puts them together.

In: a layer's weights and the statistics of the text. Out: the layer in MLA form, ranks moved between layers, and what
refits its output projection.
"""
