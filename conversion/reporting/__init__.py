"""What was planned, done and found, for people: tables, JSON, model card, pictures, cache sizes.

In: plans, verifications, configurations. Out: files beside the weights, and tables for the terminal. A new form of
report is one file.
"""
