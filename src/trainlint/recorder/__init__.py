"""The instruments that run inside the user's process.

This package imports the standard library and the user's own torch, nothing else: it is loaded from its files into
interpreters in which trainlint is not installed, under the name ``_trainlint_recorder``. Use relative imports only.
"""
