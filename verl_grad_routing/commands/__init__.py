"""Commands of ``vgr``, one module each; importing one costs nothing that its help does not need."""
