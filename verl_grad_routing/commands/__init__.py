"""Commands of ``vgr``, one module each; heavy imports inside."""
