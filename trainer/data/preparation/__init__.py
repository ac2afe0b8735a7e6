"""Preparation of a corpus: documents to tokens, in tasks that several processes share and a later call resumes."""
