"""Commands of ``vgr`` that have a module of their own; each is registered by one line in ``cli``."""
