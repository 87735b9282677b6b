"""Everything of transformers that it does not export, by subject; ``private_names.py`` lists the names.

Imports of transformers are inside functions, because importing veomni does not import transformers.
"""
