"""Command-line options of the verbs of `shoestring`, one file per family of verbs.

All of these files are imported for every verb. A verb's imports are inside its function, as torch is slow to load.
"""
