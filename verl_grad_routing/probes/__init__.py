"""Fitting linear probes: labelled rollouts in, one file out that detector ``linear_probe`` loads."""
