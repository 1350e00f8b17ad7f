"""Contrastive pairs for three concepts in plain English, not tied to any task: 80 each, none about programming.

``shortcut``: the request's letter is met and its purpose is not, against honest work that says what is missing.
``deception``: the speaker makes somebody believe what is false, against the truth.
``evaluation_awareness``: the speaker takes the request for a test and plays to the scorer, against just answering.

Every prompt is one user message, so that a chat template applies; the two sides of a pair are about equally long. Each
pair has two tags: ``fit`` or ``held_out`` (every fourth pair, 20 of 80), and its topic. When Reward Hacking Rebounds
(arXiv 2604.01476) uses 80 pairs of its own, which are not in its text; these were written for this package.

A selector reaches them as ``pkg://verl_grad_routing.directions.concepts/shortcut.jsonl[@tag,tag]``.
"""
