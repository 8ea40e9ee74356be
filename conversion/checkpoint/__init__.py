"""Files in and out, and nothing but formats: where a model lies, what its files hold, how new ones are written.

In: a folder, a GGUF file or a Hub id. Out: tensors by name, a configuration, a tokenizer; a folder that is complete or
absent. A new format is one reader.
"""
