"""What a conversion will do, before it does anything: sizes by layer, text, time, memory and disk.

In: a recipe and a source's configuration. Out: a `ConversionPlan`, or the reason why there is none.
"""
