"""Pipeline programs: which rank does what in which order, as data that is checked, drawn, simulated and executed."""
