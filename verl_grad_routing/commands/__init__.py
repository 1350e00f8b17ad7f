"""Commands of ``vgr`` in files of their own; each exports ``register(app)``."""
