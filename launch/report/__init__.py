"""Report of a run as one self-contained HTML page, one file per section."""
