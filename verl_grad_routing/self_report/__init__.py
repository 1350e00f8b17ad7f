"""Self-report (Spilling the Beans, arXiv 2511.06626): teach a model to admit known errors, then ask it about others."""
