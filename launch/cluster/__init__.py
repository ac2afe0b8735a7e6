"""Several simulated machines on this one, for rehearsals and tests."""
