"""`shoestring report`: what a run was, as one self-contained page. A file a section."""
