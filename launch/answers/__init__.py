"""Answer of a verb, and its three renderings: terminal, JSON and HTML."""
