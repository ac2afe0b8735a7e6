"""Pipeline schedules and their registry."""
