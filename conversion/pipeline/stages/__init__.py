"""The stages of a conversion, each one function of one name.

In: a `ConversionJob`. Out: what the next stages read, left in its work folder; at last a checkpoint, verified and
described. A new stage is one file, and one name in `conversion.pipeline.conversion.STAGES`.
"""
