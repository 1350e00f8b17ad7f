"""The verl glue: CPU platform, routed engine, worker and trainer."""
