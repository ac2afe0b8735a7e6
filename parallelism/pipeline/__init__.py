"""Pipeline programs: a list of instructions per rank, which is checked, drawn, simulated and executed."""
