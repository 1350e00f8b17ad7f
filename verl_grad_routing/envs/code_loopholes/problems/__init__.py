"""The shipped problems: ``problems.jsonl``, written by ``build`` from the modules beside it and held to them by a test.

Statements, references and tests are this project's own, under its licence (Apache-2.0).
"""
