"""Commands of ``vgr``, a module each; they import what they need when they run."""
