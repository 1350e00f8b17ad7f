"""Gradient routing for reinforcement learning with verl.

Importing this package is free of torch, verl, ray and vLLM; the rooms below it import what they need.
"""

__version__ = "0.1.0"
