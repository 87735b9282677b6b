"""Everything of transformers that it does not export, by subject; seen on 5.17 to 5.23.

Each module lists the names it uses in ``PRIVATE`` (:class:`~veomni.compat.private_name.PrivateName`: reason, and what
happens without), and no other file uses one: ``tests/models/transformers_api`` checks both. Imports of transformers are
inside functions, because importing veomni does not import transformers.
"""
