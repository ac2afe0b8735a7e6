"""Options of the verbs of `shoestring`, a file a family, beside what runs each verb.

All of these files are loaded whichever verb is asked for. What a verb needs is imported where it runs: torch is slow.
"""
