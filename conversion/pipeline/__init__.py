"""A conversion as a list of stages, which `conversion` names and `runner` runs.

In: a plan and its source. Out: a published checkpoint and its report; a work folder from which a stopped run goes on.
"""
