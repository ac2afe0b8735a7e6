"""The verbs of `shoestring`, a file a family: each one's options beside what runs it.

All of these files are loaded whichever verb is asked for. What a verb needs is imported where it runs: torch is slow.
"""
