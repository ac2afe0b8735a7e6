"""Starting the ranks of a run and ending them: launcher, rendezvous of nodes, preflight, signals, run directory."""
