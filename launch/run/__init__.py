"""Starting the ranks of a run and ending them: launcher, machines, preflight, signals, run directory."""
