"""A sweep: one model converted to several sizes of its cache, which share one calibration.

In: a recipe, and sizes. Out: a checkpoint of each, or its figures alone; one report, one picture, one recommendation.
"""
