"""`shoestring data`: preparation of a corpus, and looks at prepared data, samples and tokenizers."""
